"""Layers on pictures (n, channels, height, width)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from mpidl import functional
from mpidl.errors import InvalidArgument
from mpidl.nn import init
from mpidl.nn.linear import fresh
from mpidl.nn.module import Module
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.autograd import Tensor

    Pair: TypeAlias = int | tuple[int, int]


class Conv2d(Module):
    """Cross-correlation with `outputs` kernels, plus bias: LeCun et al. 1989.

    weight is (outputs, inputs / groups, *kernel), bias (outputs,); output channels of a group see
    that group's input channels only. kernel, stride, padding (by zeros) and dilation are one
    number, or one each for height and width. An output measures
    (size + 2 padding - dilation (kernel - 1) - 1) // stride + 1.

    Starts uniform in +-1/sqrt(inputs / groups x kernel elements). Raises InvalidArgument for
    sizes that cannot be, and for channels that `groups` does not divide.
    """

    @refuses
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Pair,
        *,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        who = f"Conv2d({inputs}, {outputs}, {kernel=}, {groups=})"
        if min(inputs, outputs, groups) < 1 or inputs % groups or outputs % groups:
            raise InvalidArgument(f"{who}: expected positive sizes that the groups divide")
        self.kernel = pair(kernel, 1, f"{who}: kernel")
        self.stride = pair(stride, 1, f"{who}: stride")
        self.padding = pair(padding, 0, f"{who}: padding")
        self.dilation = pair(dilation, 1, f"{who}: dilation")
        self.groups = groups
        fan_in = inputs // groups * self.kernel[0] * self.kernel[1]
        self.weight = init.lecun_uniform(fresh(outputs, inputs // groups, *self.kernel), fan_in)
        self.bias = init.lecun_uniform(fresh(outputs), fan_in) if bias else None

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output (n, outputs, height, width)."""
        return functional.conv2d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def arguments(self) -> str:
        """Return channels, kernel and what is unusual."""
        text = f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}, {self.kernel=}"
        text += f", {self.stride=}" * (self.stride != (1, 1))
        text += f", {self.padding=}" * (self.padding != (0, 0))
        text += f", {self.dilation=}" * (self.dilation != (1, 1))
        text += f", {self.groups=}" * (self.groups != 1)
        return (text + ", bias=False" * (self.bias is None)).replace("self.", "")


class MaxPool2d(Module):
    """The largest of each window of x (n, channels, height, width).

    size, stride (by default the size) and padding are one number, or one each for height and
    width. Raises InvalidArgument for sizes that cannot be, and for a padding beyond half the size.
    """

    @refuses
    def __init__(self, size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        who = f"{type(self).__name__}({size})"
        self.size = pair(size, 1, f"{who}: size")
        self.stride = self.size if stride is None else pair(stride, 1, f"{who}: stride")
        self.padding = pair(padding, 0, f"{who}: padding")
        if any(2 * p > s for p, s in zip(self.padding, self.size, strict=True)):
            raise InvalidArgument(f"{who}: padding {padding}: expected at most half the size")

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output (n, channels, height, width)."""
        return functional.max_pool2d(x, self.size, stride=self.stride, padding=self.padding)

    def arguments(self) -> str:
        """Return the size and what is unusual."""
        text = f"{self.size=}" + f", {self.stride=}" * (self.stride != self.size)
        return (text + f", {self.padding=}" * (self.padding != (0, 0))).replace("self.", "")


class AvgPool2d(MaxPool2d):
    """The mean of each window of x (n, channels, height, width), zeros of the padding included.

    Takes the arguments of `MaxPool2d`.
    """

    def forward(self, x: Tensor | Array) -> Tensor:
        """Return the output (n, channels, height, width)."""
        return functional.avg_pool2d(x, self.size, stride=self.stride, padding=self.padding)


def pair(value: Pair, least: int, who: str) -> tuple[int, int]:
    """Return one number twice, or two as they are; InvalidArgument for any below `least`."""
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(not isinstance(n, int) or n < least for n in both):
        raise InvalidArgument(f"{who} {value}: expected one or two whole numbers from {least} on")
    return both[0], both[1]
