"""LARS and LAMB: rates of their own for each parameter, for large batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import blocks
from mpidl.optim.adam import directions
from mpidl.optim.base import check, check_eps, rate, zeros
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array, Averages
    from mpidl.optim.base import Layers, Rate


@dataclass
class LARS:
    """v = momentum v + lr q (g + weight_decay p);  p = p - v  (You, Gitman, Ginsburg 2017).

    q = trust |p| / (|g| + weight_decay |p|), with norms over one parameter (algorithm 1); 1 where
    |p| or the denominator is 0, so that parameters may start from zeros. Biases and the like are
    better left to `SGD`, by a group. Raises InvalidArgument for values out of range.
    """

    lr: Rate
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust: float = 1e-3

    @refuses
    def __post_init__(self) -> None:
        check(self, lr=(0, math.inf), momentum=(0, 1), weight_decay=(0, 1), trust=(0, math.inf))

    def init(self, param: Array) -> dict[str, Array]:
        """Return the velocity (n,)."""
        return zeros(param, "velocity")

    def update(
        self,
        param: Array,
        grad: Array,
        state: dict[str, Array],
        step: int,
        layers: Layers,
        averages: Averages,
    ) -> None:
        """Make one step in place, parameter by parameter. Collective."""
        lr, velocity = rate(self, self.lr, step), state["velocity"]
        momentum, decay, trust = float(self.momentum), float(self.weight_decay), float(self.trust)
        for part, g in averages:  # the norms are over all of it
            grad[part] = g
        norms = layers.norms(param, grad).T.tolist()
        for part, (p_norm, g_norm) in zip(layers.parts, norms, strict=True):
            size = g_norm + decay * p_norm
            local = lr * (trust * p_norm / size if p_norm and size else 1.0)
            _descend(param[part], grad[part], velocity[part], momentum, decay, local)


def _descend(
    param: Array, grad: Array, velocity: Array, momentum: float, decay: float, lr: float
) -> None:
    for part in blocks(param):
        p, g, v = param[part], grad[part], velocity[part]
        if decay:
            g += decay * p
        g *= lr
        v *= momentum
        v += g
        p -= v


@dataclass
class LAMB:
    """p = p - lr |p| / |u| u, u = m' / (sqrt(v') + eps) + weight_decay p  (You et al. 2020).

    m' and v' as in `Adam` (algorithm 2); norms are over one parameter, and |p| / |u| is 1 where
    either is 0. Raises InvalidArgument for values out of range.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
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
        grad: Array,
        state: dict[str, Array],
        step: int,
        layers: Layers,
        averages: Averages,
    ) -> None:
        """Make one step in place: `grad` becomes u, then each parameter moves. Collective."""
        lr, decay = rate(self, self.lr, step), float(self.weight_decay)
        found = directions(param, state, step, averages, self.betas, float(self.eps))
        for part, g, scale in found:
            g *= scale
            if decay:
                g += decay * param[part]
            grad[part] = g
        norms = layers.norms(param, grad).T.tolist()
        for whole, (p_norm, u_norm) in zip(layers.parts, norms, strict=True):
            local = lr * (p_norm / u_norm if p_norm and u_norm else 1.0)
            for part in blocks(param[whole]):
                p, g = param[whole][part], grad[whole][part]
                g *= local
                p -= g
