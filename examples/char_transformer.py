"""Learn to write like a text, character by character: a small transformer.

mpidl run -n 2 examples/char_transformer.py --text FILE

Without --text it learns from the source of Python's argparse, 100 KB: expect 1.9 bits for each
character of its end, which it has not seen, after 15 s on 2 ranks. How common each character is
tells no more than 4.2 bits.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

import numpy as np
import options

import mpidl
from mpidl import data, nn, optim
from mpidl.optim import schedules

if TYPE_CHECKING:
    from mpidl import Tensor
    from mpidl.array import Array

LENGTH = 64  # characters that the model looks back on


class Writer(nn.Module):
    """Ids (n, length) of characters to logits (n, length, characters) of those that come next."""

    def __init__(self, characters: int, width: int = 64) -> None:
        self.character = nn.Embedding(characters, width)
        self.place = nn.Embedding(LENGTH, width)
        self.blocks = [nn.TransformerBlock(width, heads=4, causal=True) for _ in range(2)]
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, ids: Array) -> Tensor:  # noqa: D102
        x = self.character(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss(logits: Tensor, ids: Array) -> Tensor:
    return nn.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1))


def write(model: nn.Module, ids: Array, count: int, rng: np.random.Generator) -> Array:
    """Return ids (n,) with `count` more, which the model finds likely."""
    for _ in range(count):
        logits = model.predict(ids[None, -LENGTH:])[0, -1]
        odds = np.exp((logits - logits.max()) / 0.8)  # below 1: bolder than it is sure
        ids = np.append(ids, rng.choice(len(odds), p=odds / odds.sum()))
    return ids


def main() -> None:
    parser = options.parser(__doc__, epochs=20, batch_size=32)
    parser.add_argument("--text", default=argparse.__file__, help="a file in UTF-8")
    args = parser.parse_args()
    world = mpidl.init()
    nn.seed(args.seed)
    train, test = data.text(args.text, LENGTH)
    steps = args.epochs * len(data.batches(train, args.batch_size, world=world))
    trainer = mpidl.Trainer(
        Writer(len(train.vocabulary)).to(args.device),
        loss,
        optim.AdamW(schedules.warm_up(schedules.cosine(3e-3, steps), max(1, steps // 10))),
        clip_norm=1.0,
        strategy=args.strategy,
        out=args.out,
        settings=vars(args),
    )
    history = trainer.fit(train, args.epochs, args.batch_size, evaluate=test, seed=args.seed)
    if world.rank == 0:
        counts = np.bincount(train.ids, minlength=len(train.vocabulary)) + 1
        alone = -np.log2(counts / counts.sum())[test.ids].mean()
        bits = history[-1].metrics["loss"] / math.log(2)
        ids = write(trainer.model, test.ids[:LENGTH], 300, np.random.default_rng(args.seed))
        print(f"strategy       {trainer.replica.choice.name}")
        print(f"writes         {train.vocabulary.decode(ids[LENGTH:])}")
        print(f"test loss      {bits:.2f} bits per character; {alone:.2f} by how common each is")


if __name__ == "__main__":
    main()
