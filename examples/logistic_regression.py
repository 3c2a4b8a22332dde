"""Tell benign from malignant tumours by thirty measurements: logistic regression.

mpidl run -n 2 examples/logistic_regression.py

Expect 98.2 % on tumours never trained on, after 3 s, and with other splits of the data 97.6 % on
average. Features are scaled by their means and deviations over the samples of all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import options

import mpidl
from mpidl import data, nn, optim

if TYPE_CHECKING:
    from mpidl import Tensor
    from mpidl.array import Array


def loss(logits: Tensor, benign: Array) -> Tensor:
    return nn.binary_cross_entropy(logits.reshape(-1), benign)


def main() -> None:
    args = options.parse(__doc__, epochs=30, batch_size=32)
    world = mpidl.init()
    nn.seed(args.seed)
    train, test = data.breast_cancer()
    scaler = data.StandardScaler.fit(train, world=world)
    model = nn.Linear(30, 1)
    trainer = mpidl.Trainer(
        model.to(args.device),
        loss,
        optim.SGD(lr=0.1, momentum=0.9, weight_decay=1e-2),
        strategy=args.strategy,
        metrics={"accuracy": nn.binary_accuracy},
        out=args.out,
        settings=vars(args),
    )
    history = trainer.fit(
        scaler.apply(train),
        args.epochs,
        args.batch_size,
        evaluate=scaler.apply(test),
        seed=args.seed,
    )
    if world.rank == 0:
        accuracy = history[-1].metrics["accuracy"]
        print(f"strategy       {trainer.replica.choice.name}")
        print(f"test accuracy  {accuracy:.2%} on {len(test)} tumours never trained on")


if __name__ == "__main__":
    main()
