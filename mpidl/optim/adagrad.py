"""Adagrad."""

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
class Adagrad:
    """s = s + g^2;  p = p - lr / (1 + lr_decay t) g / (sqrt(s) + eps)  (Duchi et al. 2011).

    t counts the updates made before; s begins as `initial`. `weight_decay` p is added to g.
    Raises InvalidArgument for values out of range.
    """

    lr: Rate = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial: float = 0.0
    eps: float = 1e-10

    @refuses
    def __post_init__(self) -> None:
        infinite = (0, math.inf)
        check(self, lr=infinite, lr_decay=infinite, weight_decay=(0, 1), initial=infinite)
        check_eps(self, self.eps)

    def init(self, param: Array) -> dict[str, Array]:
        """Return the sum of squares (n,)."""
        state = zeros(param, "square")
        state["square"].fill(self.initial)
        return state

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
        xp, decay = namespace(param), float(self.weight_decay)
        lr = rate(self, self.lr, step) / (1 + float(self.lr_decay) * step)
        for part, g in averages:
            p, square = param[part], state["square"][part]
            if decay:
                g += decay * p
            scratch = g * g
            square += scratch
            xp.sqrt(square, out=scratch)
            scratch += float(self.eps)
            g /= scratch
            g *= lr
            p -= g
