"""Learn to write like a text, character by character: a small transformer in PyTorch.

mpidl run -n 2 examples/pytorch/transformer.py --text FILE --checkpoint FOLDER

With clipping, a schedule, accumulation over parts of a batch, and a checkpoint after every epoch,
from which the same command goes on, on any number of ranks. Without --text it learns from the
source of Python's argparse, 100 KB: expect 1.9 bits for each character of its end, which it has not
seen, after half a minute on 2 ranks.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mpidl
from mpidl import checkpoint, data
from mpidl.torch import Checkpointed, DataParallel, loader

LENGTH = 64  # characters that the model looks back on


class Writer(nn.Module):  # type: ignore[misc]
    """Ids (n, length) of characters to logits (n, length, characters) of those that come next."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.character = nn.Embedding(characters, width)
        self.place = nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, 2, norm, enable_nested_tensor=False)
        self.out = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, ids: Any) -> Any:  # noqa: D102
        n = ids.shape[1]
        x = self.character(ids) + self.place.weight[:n]
        return self.out(self.blocks(x, mask=self.mask[:n, :n], is_causal=True))


def windows(part: data.TextDataset) -> Any:
    """Return windows of a text as a dataset of ids (length,), and those one character later."""
    return torch.utils.data.TensorDataset(*map(torch.from_numpy, part.take(np.arange(len(part)))))


def loss_of(logits: Any, ids: Any) -> Any:
    """Return the sum over all characters, in nats."""
    return cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=argparse.__file__, help="a file in UTF-8")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="windows, all ranks together")
    parser.add_argument("--accumulate", type=int, default=2, help="parts of a rank's share")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    parser.add_argument("--stop-after", type=int, help="end after this epoch, to go on later")
    args = parser.parse_args()
    world = mpidl.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    text, rest = data.text(args.text, LENGTH)
    batches = loader(windows(text), args.batch_size, seed=args.seed)
    model = Writer(len(text.vocabulary), args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = args.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, steps, pct_start=0.1, cycle_momentum=False
    )
    replica = DataParallel(model, optimizer)
    state, done = Checkpointed(replica, optimizer, schedule), 0
    if args.checkpoint and args.checkpoint.exists():  # on all ranks
        done = checkpoint.load(state, args.checkpoint).extra["epochs"]

    for epoch in range(done, args.stop_after or args.epochs):
        batches.set_epoch(epoch)
        total = 0.0
        for ids, following in batches:  # this rank's share
            optimizer.zero_grad()
            parts = torch.stack((ids, following)).chunk(args.accumulate, dim=1)
            for i, (x, y) in enumerate(parts):
                last = i == len(parts) - 1
                with nullcontext() if last else replica.no_sync():
                    loss = loss_of(replica(x), y)
                    (loss / max(1, following.numel())).backward()  # the last one averages
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        mean = world.sum([total])[0] / (len(text) * LENGTH)
        if world.rank == 0:
            print(f"epoch {epoch + 1:<3}      loss {mean:.6f}")
        if args.checkpoint:
            updates, extra = (epoch + 1) * len(batches), {"epochs": epoch + 1}
            checkpoint.save(state, args.checkpoint, step=updates, extra=extra)

    if world.rank == 0:
        x, y = windows(rest).tensors
        with torch.no_grad():
            bits = loss_of(model(x), y).item() / y.numel() / math.log(2)
        print(f"strategy       {replica.choice.name}")
        print(f"test loss      {bits:.4f} bits per character")


if __name__ == "__main__":
    main()
