"""Activations: functions of single elements, and softmax. All keep the shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl import functional
from mpidl.errors import InvalidArgument
from mpidl.nn.module import Module
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.autograd import Tensor


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.relu(x)


class LeakyReLU(Module):
    """x above 0, slope x elsewhere (Maas et al. 2013)."""

    @refuses
    def __init__(self, slope: float = 0.01) -> None:
        self.slope = slope

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.leaky_relu(x, self.slope)

    def arguments(self) -> str:
        """Return the slope."""
        return f"slope={self.slope}"


class GELU(Module):
    """x Phi(x), Phi being the normal distribution's (Hendrycks and Gimpel 2016).

    approximate="tanh" takes their approximation, which is cheaper. Raises InvalidArgument for
    another word than "none" and "tanh".
    """

    @refuses
    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise InvalidArgument(f"GELU({approximate!r}): expected 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.gelu(x, approximate=self.approximate)

    def arguments(self) -> str:
        """Return the approximation, if there is one."""
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.sigmoid(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.tanh(x)


class Softmax(Module):
    """exp(x) over its sum along `axis`."""

    @refuses
    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.softmax(x, axis=self.axis)

    def arguments(self) -> str:
        """Return the axis."""
        return f"axis={self.axis}"


class Threshold(Module):
    """x above `threshold`, `value` elsewhere."""

    @refuses
    def __init__(self, threshold: float, value: float) -> None:
        self.threshold, self.value = threshold, value

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output, shaped like `x`."""
        return functional.threshold(x, self.threshold, self.value)

    def arguments(self) -> str:
        """Return threshold and value."""
        return f"{self.threshold}, {self.value}"
