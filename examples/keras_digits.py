"""Teach a small network to read handwritten digits with Keras 3, on any number of ranks.

KERAS_BACKEND=torch mpidl run -n 2 examples/keras_digits.py

Backends are jax, torch and tensorflow. Expect 97 % to 98.5 % on digits never trained on.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import mpidl.keras as hvd
from mpidl import data

EPOCHS, BATCH, RATE = 30, 64, 0.1  # of all ranks together


def main() -> None:
    hvd.init()
    train, test = data.digits()
    x, y = train.x, train.y
    samples = len(x) // BATCH * BATCH  # so that all ranks make the same steps
    part = slice(hvd.rank(), samples, hvd.size())
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(256, "relu"),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=0.9)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        x[part],
        y[part],
        batch_size=BATCH // hvd.size(),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.LearningRateWarmupCallback(RATE, warmup_epochs=3),
        ],
    )
    if hvd.rank() == 0:
        _, accuracy = model.evaluate(test.x, test.y, verbose=0)
        print(f"test accuracy  {accuracy:.2%} on {len(test)} digits never trained on")


if __name__ == "__main__":
    main()
