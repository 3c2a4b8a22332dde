"""Bounds on the averaged gradient: on each element, and on the norm of all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import namespace
from mpidl.errors import InvalidArgument
from mpidl.optim.base import square_sums
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array


@dataclass(frozen=True)
class Clip:
    """Every element into [-value, value], then the whole, if longer than `norm`, to that length.

    Raises InvalidArgument unless both are above 0, or None.
    """

    value: float | None = None
    norm: float | None = None

    @refuses
    def __post_init__(self) -> None:
        for name, bound in (("clip_value", self.value), ("clip_norm", self.norm)):
            if bound is not None and not 0 < bound < math.inf:
                raise InvalidArgument(f"{name}={bound}: expected 0 < {name} < inf, or None")

    @property
    def bounds_late(self) -> bool:
        """Whether elements are clipped in `finish` only: nobody asks for the norm."""
        return self.value is not None and self.norm is None

    def measure(self, grad: Array, start: int = 0) -> Array:
        """Clip the elements of a flat slice, in place, and return its `square_sums`."""
        self._bound(grad)
        return square_sums(grad, start)

    def factor(self, norm: float) -> float:
        """Return what to multiply a gradient with that has this norm.

        self.norm / (norm + 1e-6), at most 1: as `torch.nn.utils.clip_grad_norm_` does.
        """
        return 1.0 if self.norm is None else min(1.0, float(self.norm) / (norm + 1e-6))

    def finish(self, grad: Array, factor: float) -> None:
        """Clip a flat slice, in place, as far as `measure` has not done so."""
        if self.bounds_late:
            self._bound(grad)
        if factor != 1:
            grad *= factor

    def _bound(self, grad: Array) -> None:
        if self.value is not None:
            bound = float(self.value)
            namespace(grad).clip(grad, -bound, bound, out=grad)
