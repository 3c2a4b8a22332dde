"""Teach a convolutional network to read handwritten digits.

mpidl run -n 2 examples/digits_cnn.py --workers 1

In every epoch it sees each picture elsewhere, up to one pixel to each side; the workers of a
`Loader` see to that. Expect 98.6 % to 98.9 % on digits never trained on, after 5 s on 2 ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import options

import mpidl
from mpidl import data, nn, optim

if TYPE_CHECKING:
    from mpidl.array import Array


def pictures(digits: data.ArrayDataset) -> data.ArrayDataset:
    return data.ArrayDataset(digits.x.reshape(-1, 1, 8, 8), digits.y)


def move(x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Cut each picture out of itself with a frame of zeros, one pixel wide."""
    framed = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    tops, lefts = rng.integers(0, 3, (2, len(x)))
    places = zip(framed, tops, lefts, strict=True)
    return np.stack([p[:, top : top + 8, left : left + 8] for p, top, left in places]), y


def main() -> None:
    parser = options.parser(__doc__, epochs=20)
    parser.add_argument("--workers", type=int, default=0, help="processes of each rank")
    args = parser.parse_args()
    world = mpidl.init()
    nn.seed(args.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32, sync=True),  # of all ranks' samples, as if they were one rank's
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64, sync=True),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * 4 * 4, 10),
    )
    train, test = map(pictures, data.digits())
    loader = data.Loader(
        train, args.batch_size, world=world, workers=args.workers, transform=move, seed=args.seed
    )
    trainer = mpidl.Trainer(
        model.to(args.device),
        nn.cross_entropy,
        optim.AdamW(optim.schedules.cosine(3e-3, args.epochs * len(loader)), weight_decay=0.05),
        strategy=args.strategy,
        out=args.out,
        settings=vars(args),
    )
    history = trainer.fit(loader, args.epochs, evaluate=test)
    if world.rank == 0:
        accuracy = history[-1].metrics["accuracy"]
        print(f"strategy       {trainer.replica.choice.name}")
        print(f"test accuracy  {accuracy:.2%} on {len(test)} digits never trained on")


if __name__ == "__main__":
    main()
