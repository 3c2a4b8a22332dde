"""The models of `mpidl bench step --framework torch`, written as PyTorch's users write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpidl.bench import engine_torch

if TYPE_CHECKING:
    from mpidl.array import Array

ROWS = {"wide": 32, "mlp": 128, "cnn": 32, "resnet18": 16, "transformer": 8}
CLASSES, LETTERS, LENGTH = 10, 96, 128
WIDTH, HEADS, BLOCKS = 256, 4, 4


def batch(name: str, rows: int, seed: int = 0) -> tuple[Array, Array]:
    """Return the inputs and labels of one batch: random, and the same for one seed."""
    rng = np.random.default_rng(seed)
    if name == "transformer":
        text = rng.integers(0, LETTERS, (2, rows, LENGTH))
        return text[0], text[1].reshape(-1)
    shape = {"wide": (1024,), "mlp": (784,)}.get(name, (3, 32, 32))
    return rng.standard_normal((rows, *shape)).astype("f"), rng.integers(0, CLASSES, rows)


def model(name: str) -> Any:
    """Return the model `name` of `ROWS`."""
    if name == "mlp":
        return engine_torch.linear_layers(784, 2048, 2048)
    if name == "resnet18":
        return resnet18()
    if name == "transformer":
        return Transformer()
    return engine_torch.model(name)


class Residual(torch.nn.Module):  # type: ignore[misc]
    """Two 3x3 convolutions with a way around them (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            torch.nn.BatchNorm2d(outputs),
            torch.nn.ReLU(),
            torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            torch.nn.BatchNorm2d(outputs),
        )
        self.around = torch.nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.around.append(torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.around.append(torch.nn.BatchNorm2d(outputs))

    def forward(self, x: Any) -> Any:
        """(n, c, h, w) -> (n, c', h/stride, w/stride)."""
        return torch.relu(self.body(x) + self.around(x))


def resnet18() -> Any:
    """Return a network of ResNet-18's shape for images (n, 3, 32, 32): 11 million parameters."""
    layers = [torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(64)]
    layers.append(torch.nn.ReLU())
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, CLASSES)]
    return torch.nn.Sequential(*layers)


class Transformer(torch.nn.Module):  # type: ignore[misc]
    """ids (n, length) -> logits (n length, letters): causal, of four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(LETTERS, WIDTH)
        self.places = torch.nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, LETTERS)
        self.register_buffer(
            "mask", torch.nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False
        )

    def forward(self, ids: Any) -> Any:
        """Return the logits."""
        x = self.blocks(self.letters(ids) + self.places, mask=self.mask, is_causal=True)
        return self.head(x).view(-1, LETTERS)
