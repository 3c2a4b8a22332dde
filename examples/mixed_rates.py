"""Teach a network to read digits with a cyclical rate, and its last layer with another one.

mpidl run -n 2 examples/mixed_rates.py

The name of a parameter tells which optimizer it has. A cyclical rate (Smith 2017) needs no search
for the best one: it passes it in every cycle. Expect 97.5 % to 98 % on digits never trained on,
after 3 s on 2 ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import options

import mpidl
from mpidl import data, nn, optim
from mpidl.optim import schedules

if TYPE_CHECKING:
    from mpidl import Tensor
    from mpidl.array import Array


class Reader(nn.Module):
    """Pictures (n, 64) to logits (n, 10)."""

    def __init__(self) -> None:
        self.features = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Array) -> Tensor:  # noqa: D102
        return self.head(self.features(x))


def main() -> None:
    args = options.parse(__doc__, epochs=24)
    world = mpidl.init()
    nn.seed(args.seed)
    train, test = data.digits()
    steps = len(data.batches(train, args.batch_size, world=world))  # of one epoch
    cycle = schedules.triangular2(0.01, 0.3, half=4 * steps)
    trainer = mpidl.Trainer(
        Reader().to(args.device),
        nn.cross_entropy,
        {"features.*": optim.SGD(cycle, momentum=0.9), "*": optim.AdamW(1e-3)},
        strategy=args.strategy,
        out=args.out,
        settings=vars(args),
    )
    history = trainer.fit(train, args.epochs, args.batch_size, evaluate=test, seed=args.seed)
    if world.rank == 0:
        print(f"strategy       {trainer.replica.choice.name}")
        for epoch in history:
            rate = cycle(epoch.steps)
            print(f"epoch {epoch.epoch:<3}      rate {rate:.3f} {'#' * round(100 * rate)}")
        accuracy = history[-1].metrics["accuracy"]
        print(f"test accuracy  {accuracy:.2%} on {len(test)} digits never trained on")


if __name__ == "__main__":
    main()
