"""RMSprop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import namespace
from mpidl.optim.base import check, check_eps, rate, zeros
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array, Averages
    from mpidl.optim.base import Layers, Rate


@dataclass
class RMSprop:
    """s = alpha s + (1 - alpha) g^2;  p = p - lr g / (sqrt(s) + eps)  (Hinton 2012, lecture 6e).

    With `centered`, s less the square of a = alpha a + (1 - alpha) g stands under the root (Graves
    2013, section 4.2). With `momentum` the step is b = momentum b + g / (sqrt(s) + eps).
    `weight_decay` p is added to g. Raises InvalidArgument for values out of range.
    """

    lr: Rate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    @refuses
    def __post_init__(self) -> None:
        check(self, lr=(0, math.inf), alpha=(0, 1), weight_decay=(0, 1), momentum=(0, 1))
        check_eps(self, self.eps)

    def init(self, param: Array) -> dict[str, Array]:
        """Return s / (1 - alpha); a / (1 - alpha) and b where they are used."""
        names = {"mean": self.centered, "velocity": bool(self.momentum)}
        return zeros(param, "square", *(name for name, used in names.items() if used))

    def update(
        self,
        param: Array,
        _grad: Array,
        state: dict[str, Array],
        step: int,
        _layers: Layers,
        averages: Averages,
    ) -> None:
        """Make one step in place, block by block."""
        xp, lr = namespace(param), rate(self, self.lr, step)
        alpha, momentum, decay = float(self.alpha), float(self.momentum), float(self.weight_decay)
        root = math.sqrt(1 - alpha)  # sqrt(s) is root sqrt(square)
        for part, g in averages:
            p, square = param[part], state["square"][part]
            if decay:
                g += decay * p
            square *= alpha
            scratch = g * g
            square += scratch
            if self.centered:
                mean = state["mean"][part]
                mean *= alpha
                mean += g
                xp.multiply(mean, mean, out=scratch)
                scratch *= alpha - 1
                scratch += square
                xp.maximum(scratch, 0, out=scratch)  # rounding may leave a variance below 0
                xp.sqrt(scratch, out=scratch)
            else:
                xp.sqrt(square, out=scratch)
            scratch += float(self.eps) / root
            g /= scratch
            if momentum:
                velocity = state["velocity"][part]
                velocity *= momentum
                velocity += g
                xp.multiply(velocity, lr / root, out=g)
            else:
                g *= lr / root
            p -= g
