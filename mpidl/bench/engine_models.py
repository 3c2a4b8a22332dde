"""The models of `mpidl bench engine` and `step`, and what makes one training step of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional, nn, optim
from mpidl.array import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

    Step = Callable[[], None]

RATE = 0.01
CLASSES = 10
WIDTH, HEADS, LENGTH, LETTERS = 128, 4, 128, 64
#: Inputs and hidden layers of those that are linear layers only.
WIDTHS = {
    "mlp": (784, 1024, 1024),
    "wide": (1024, 8192, 4096),  # 42 million parameters, in two layers
    "deep": (1024,) * 17,  # 17 million, in layers of one size
}
ROWS = {"mlp": 128, "cnn": 32, "transformer": 16, "wide": 32, "deep": 32}


def batch(name: str, rows: int | None = None, seed: int = 0) -> tuple[Array, Array]:
    """Return the inputs and labels of one batch: random, and the same in both engines.

    `rows` samples, by default those of `ROWS`.
    """
    rng = np.random.default_rng(seed)
    n = ROWS[name] if rows is None else rows
    if name in WIDTHS:
        pixels = WIDTHS[name][0]
        return rng.standard_normal((n, pixels)).astype("f"), rng.integers(0, CLASSES, n)
    if name == "cnn":
        x = rng.standard_normal((n, 3, 32, 32)).astype("f")
        return x, rng.integers(0, CLASSES, n)
    text = rng.integers(0, LETTERS, (2, n, LENGTH))
    return text[0], text[1].reshape(-1)


class Transformer(nn.Module):
    """Two blocks over characters, with learnt places: ids (n, length) -> (n length, letters)."""

    def __init__(self) -> None:
        self.letters = nn.Embedding(LETTERS, WIDTH)
        self.places = nn.Parameter(np.zeros((LENGTH, WIDTH), np.float32))
        self.blocks = [nn.TransformerBlock(WIDTH, HEADS, causal=True) for _ in range(2)]
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, ids: Array) -> Any:
        """Return the logits."""
        x = self.letters(ids) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).reshape(-1, LETTERS)


def model(name: str) -> nn.Module:
    """Return the model `name` of `ROWS`."""
    if name in WIDTHS:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS[name]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(WIDTHS[name][-1], CLASSES))
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, CLASSES),
        )
    return Transformer()


def in_mpidl(name: str) -> Step:
    """Return a training step of the model `name` in this engine."""
    nn.seed(0)
    x, y = batch(name)
    network = model(name)
    optimizer, parameters = optim.SGD(RATE), network.parameters()
    layers = optim.Layers((), np.array)

    def step() -> None:
        functional.cross_entropy(network(x), y).backward()
        for p in parameters:
            flat = p.data.reshape(-1), p.grad.reshape(-1)  # type: ignore[union-attr]
            pieces = ((part, flat[1][part]) for part in blocks(flat[1]))
            optimizer.update(*flat, {}, 0, layers, pieces)
            p.zero_grad()

    return step
