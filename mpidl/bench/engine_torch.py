"""The models of `engine_models` in PyTorch eager, written as its users write them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from mpidl.bench.engine_models import (
    CLASSES,
    HEADS,
    LENGTH,
    LETTERS,
    RATE,
    WIDTH,
    WIDTHS,
    batch,
)

if TYPE_CHECKING:
    from mpidl.bench.engine_models import Step


class Block(torch.nn.Module):  # type: ignore[misc]
    """The block of `nn.TransformerBlock`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        """(n, length, width) -> the same shape."""
        qkv = self.qkv(self.first(x)).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(torch.nn.Module):  # type: ignore[misc]
    """ids (n, length) -> logits (n length, letters)."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(LETTERS, WIDTH)
        self.places = torch.nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, LETTERS)

    def forward(self, ids: Any) -> Any:
        """Return the logits."""
        x = self.blocks(self.letters(ids) + self.places)
        return self.head(self.norm(x)).view(-1, LETTERS)


def model(name: str) -> Any:
    """Return the model `name` of `engine_models.ROWS`."""
    if name in WIDTHS:
        return linear_layers(*WIDTHS[name])
    if name == "cnn":
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(64 * 8 * 8, CLASSES),
        )
    return Transformer()


def linear_layers(*widths: int) -> Any:
    """Return linear layers with ReLU between them, and one more for the classes."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], CLASSES))


def in_torch(name: str) -> Step:
    """Return a training step of the model `name`, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, batch(name))
    network = model(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step
