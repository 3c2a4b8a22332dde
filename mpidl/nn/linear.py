"""Layers of matrix products, and what goes around them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional
from mpidl.errors import InvalidArgument
from mpidl.nn import init
from mpidl.nn.module import Module, Parameter
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.autograd import Tensor


def fresh(*shape: int) -> Parameter:
    """Return a float32 parameter for an initialiser to fill."""
    return Parameter(np.empty(shape, np.float32))


class Linear(Module):
    """x weight^T + bias, for x (..., inputs), weight (outputs, inputs) and bias (outputs,).

    Starts uniform in +-1/sqrt(inputs); raises InvalidArgument for sizes below 1.
    """

    @refuses
    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        if inputs < 1 or outputs < 1:
            raise InvalidArgument(f"Linear({inputs}, {outputs}): expected two positive sizes")
        self.weight = init.lecun_uniform(fresh(outputs, inputs), inputs)
        self.bias = init.lecun_uniform(fresh(outputs), inputs) if bias else None

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the layer's output (..., outputs)."""
        return functional.linear(x, self.weight, self.bias)

    def arguments(self) -> str:
        """Return inputs, outputs and what is unusual."""
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}{', bias=False' * (self.bias is None)}"


class Embedding(Module):
    """weight[indices], for integers below `count` of any shape; weight is (count, width).

    Starts from the normal distribution; raises InvalidArgument for sizes below 1.
    """

    @refuses
    def __init__(self, count: int, width: int) -> None:
        if count < 1 or width < 1:
            raise InvalidArgument(f"Embedding({count}, {width}): expected two positive sizes")
        self.weight = init.normal(fresh(count, width))

    def forward(self, indices: Tensor | Array) -> Tensor:
        """Return the rows (*indices.shape, width)."""
        return functional.embedding(indices, self.weight)

    def arguments(self) -> str:
        """Return count and width."""
        return ", ".join(map(str, self.weight.shape))


class Flatten(Module):
    """(n, ...) to (n, product of the others)."""

    @refuses
    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the same elements, one row a sample."""
        return functional.reshape(x, (len(x), math.prod(x.shape[1:])))


class Sequential(Module):
    """Modules one after the other; parameters are named "0.weight", "0.bias", "2.weight", ..."""

    @refuses
    def __init__(self, *layers: Module) -> None:
        self.layers = layers

    def children(self) -> Iterator[tuple[str, Any]]:
        """Yield the layers by their number, then what a subclass holds besides."""
        for name, child in super().children():
            yield name.removeprefix("layers."), child

    def forward(self, x: Any) -> Any:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x
