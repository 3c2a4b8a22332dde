"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpidl.array import blocks, namespace
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from mpidl.array import Array


class Optimizer(Protocol):
    """What `DataParallel` asks of an optimizer."""

    def init(self, param: Array) -> dict[str, Array]:
        """Return the state for a flat part `param` (n,) of the parameters."""

    def update(self, param: Array, grad: Array, state: dict[str, Array]) -> None:
        """Change `param` (n,) and `state` in place, given the averaged `grad` (n,).

        `grad` may be used as scratch space: nobody reads it afterwards.
        """


@dataclass
class SGD:
    """v = momentum v + g + weight_decay p;  p = p - lr v  (Sutskever et al. 2013, section 2).

    With `nesterov` the step is momentum v + g in place of v. `lr` may be changed between steps.
    Raises InvalidArgument for values out of range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("lr", 0, float("inf")),
            ("momentum", 0, 1),
            ("weight_decay", 0, 1),
        ):
            if not low <= getattr(self, name) < high:
                raise InvalidArgument(
                    f"SGD {name}={getattr(self, name)}: expected {low} <= {name} < {high}"
                )
        if self.nesterov and not self.momentum:
            raise InvalidArgument("SGD nesterov=True needs a momentum above 0")

    def init(self, param: Array) -> dict[str, Array]:
        """Return the velocity (n,), where there is momentum."""
        return {"velocity": namespace(param).zeros_like(param)} if self.momentum else {}

    def update(self, param: Array, grad: Array, state: dict[str, Array]) -> None:
        """Make one step in place, block by block, so that each byte is touched while in cache."""
        velocity = state.get("velocity")
        # a NumPy float64 would make float32 arrays compute in float64
        lr, momentum, decay = float(self.lr), float(self.momentum), float(self.weight_decay)
        for part in blocks(param):
            p, g = param[part], grad[part]
            if decay:
                g += decay * p
            if velocity is not None:
                v = velocity[part]
                v *= momentum
                v += g
                if self.nesterov:
                    g += momentum * v
                else:
                    g[...] = v
            g *= lr
            p -= g
