"""Adam and AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import namespace
from mpidl.optim.base import check, check_eps, rate, zeros
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array, Averages
    from mpidl.optim.base import Layers, Rate


@dataclass
class Adam:
    """p = p - lr m' / (sqrt(v') + eps), with means of g and g^2 (Kingma, Ba 2015, algorithm 1).

    m = beta1 m + (1 - beta1) g and m' = m / (1 - beta1^t); likewise v with beta2 and g^2; t counts
    from 1. `weight_decay` p is added to g. Raises InvalidArgument for values out of range.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @refuses
    def __post_init__(self) -> None:
        check(self, lr=(0, math.inf), betas=(0, 1), weight_decay=(0, 1))
        check_eps(self, self.eps)

    def init(self, param: Array) -> dict[str, Array]:
        """Return both moments, as `directions` keeps them."""
        return zeros(param, "first", "second")

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
        lr, decay = rate(self, self.lr, step), float(self.weight_decay)
        found = directions(param, state, step, averages, self.betas, self.eps, l2=decay)
        for part, g, scale in found:
            p = param[part]
            g *= lr * scale
            p -= g


@dataclass
class AdamW:
    """Adam, with p = p - lr weight_decay p apart from it (Loshchilov and Hutter 2019, algorithm 2).

    As in PyTorch, the decay is lr x weight_decay. Raises InvalidArgument for values out of range.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    @refuses
    def __post_init__(self) -> None:
        check(self, lr=(0, math.inf), betas=(0, 1), weight_decay=(0, 1))
        check_eps(self, self.eps)

    def init(self, param: Array) -> dict[str, Array]:
        """Return both moments, as `directions` keeps them."""
        return zeros(param, "first", "second")

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
        lr = rate(self, self.lr, step)
        kept = 1 - lr * float(self.weight_decay)
        for part, g, scale in directions(param, state, step, averages, self.betas, self.eps):
            p = param[part]
            g *= lr * scale
            p *= kept
            p -= g


def directions(
    param: Array,
    state: dict[str, Array],
    step: int,
    averages: Averages,
    betas: tuple[float, float],
    eps: float,
    l2: float = 0.0,
) -> Iterator[tuple[slice, Array, float]]:
    """Update the moments, and turn each average g into g' so that g' x the number is Adam's step.

    The step is m' / (sqrt(v') + eps). The state holds m / (1 - beta1) and v / (1 - beta2), and
    what their factors are is worked out on Python floats: this saves three passes of thirteen.
    """
    xp = namespace(param)
    beta1, beta2 = map(float, betas)
    root = math.sqrt((1 - beta2) / (1 - beta2 ** (step + 1)))  # sqrt(v') is root sqrt(second)
    small = float(eps) / root
    scale = (1 - beta1) / (1 - beta1 ** (step + 1)) / root
    for part, g in averages:
        first, second = state["first"][part], state["second"][part]
        if l2:
            g += l2 * param[part]
        first *= beta1
        first += g
        g *= g
        second *= beta2
        second += g
        xp.sqrt(second, out=g)
        g += small
        xp.divide(first, g, out=g)
        yield part, g, scale
