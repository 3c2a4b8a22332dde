"""Chainer 7: its gradients are NumPy arrays, which are averaged where they are.

mpidl run -n 2 examples/frameworks/chainer_digits.py
"""

import argparse

import numpy as np

import mpidl
from mpidl import data

# Chainer 7.8.1, the last one, asks for the sizes of whole numbers, which NumPy 2 no longer lists.
np.sctypes = {"int": [np.int8, np.int16, np.int32, np.int64]}  # type: ignore[attr-defined]

import chainer  # noqa: E402
from chainer.functions import relu, softmax_cross_entropy  # noqa: E402
from chainer.links import Linear  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    world = mpidl.init()
    np.random.seed(0)
    layers = Linear(64, 256), relu, Linear(256, 128), relu, Linear(128, 10)
    model = chainer.Sequential(*layers)
    parameters = list(model.params())
    mpidl.average([p.array for p in parameters], weight=world.rank == 0)  # rank 0's, for all
    sgd = chainer.optimizers.MomentumSGD(0.1, 0.9).setup(model)
    train, test = data.digits()
    for epoch in range(args.epochs):
        for x, y in data.batches(train, 64, world=world, epoch=epoch):
            loss = softmax_cross_entropy(model(x), y)
            model.cleargrads()
            loss.backward()
            mpidl.average([p.grad for p in parameters], weight=len(x))
            sgd.update()
    with chainer.no_backprop_mode():
        scores = model(test.x).array
    accuracy = (scores.argmax(1) == test.y).mean()
    print(f"rank {world.rank}: test accuracy {accuracy:.2%}, sum of scores {abs(scores).sum():.9g}")


if __name__ == "__main__":
    main()
