"""The layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.autograd import Tensor, apply
from mpidl.errors import InvalidArgument
from mpidl.nn import init
from mpidl.nn.module import Module, Parameter

if TYPE_CHECKING:
    from mpidl.array import Array


class Linear(Module):
    """x weight^T + bias, for x (n, inputs), weight (outputs, inputs) and bias (outputs,)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        if inputs < 1 or outputs < 1:
            raise InvalidArgument(f"Linear({inputs}, {outputs}): expected two positive sizes")
        self.weight = Parameter(init.uniform((outputs, inputs), inputs))
        self.bias = Parameter(init.uniform((outputs,), inputs)) if bias else None

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the layer's output (n, outputs)."""
        if self.bias is None:
            return apply("linear", x, self.weight)
        return apply("linear", x, self.weight, self.bias)


class ReLU(Module):
    """max(x, 0), any shape."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return apply("relu", x)


class Sigmoid(Module):
    """1 / (1 + exp(-x)), any shape."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return apply("sigmoid", x)


class Tanh(Module):
    """Hyperbolic tangent, any shape."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return apply("tanh", x)


class Sequential(Module):
    """Modules one after the other; parameters are named "0.weight", "0.bias", "2.weight", ..."""

    def __init__(self, *layers: Module) -> None:
        self.layers = layers

    def children(self) -> Any:
        """Yield the layers by their number, then what a subclass holds besides."""
        for name, child in super().children():
            yield name.removeprefix("layers."), child

    def forward(self, x: Any) -> Any:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x
