"""Stochastic gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import namespace
from mpidl.errors import InvalidArgument
from mpidl.optim.base import check, rate, zeros
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array, Averages
    from mpidl.optim.base import Layers, Rate


@dataclass
class SGD:
    """v = momentum v + g + weight_decay p;  p = p - lr v  (Sutskever et al. 2013, section 2).

    With `nesterov` the step is momentum v + g in place of v. `lr` may be changed between steps.
    Raises InvalidArgument for values out of range.
    """

    lr: Rate
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @refuses
    def __post_init__(self) -> None:
        check(self, lr=(0, math.inf), momentum=(0, 1), weight_decay=(0, 1))
        if self.nesterov and not self.momentum:
            raise InvalidArgument("SGD nesterov=True needs a momentum above 0")

    def init(self, param: Array) -> dict[str, Array]:
        """Return the velocity (n,), where there is momentum."""
        return zeros(param, "velocity") if self.momentum else {}

    def update(
        self,
        param: Array,
        _grad: Array,
        state: dict[str, Array],
        step: int,
        _layers: Layers,
        averages: Averages,
    ) -> None:
        """Make one step in place, block by block, so that each byte is touched while in cache."""
        xp, velocity = namespace(param), state.get("velocity")
        lr = rate(self, self.lr, step)
        momentum, decay = float(self.momentum), float(self.weight_decay)
        for part, g in averages:
            p = param[part]
            if decay:
                g += decay * p
            if velocity is None:
                g *= lr
            else:
                v = velocity[part]
                v *= momentum
                v += g
                if self.nesterov:
                    g += momentum * v
                    g *= lr
                else:
                    xp.multiply(v, lr, out=g)
            p -= g
