"""The losses of an epoch, added up without error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mpidl import exact
from mpidl.array import is_device

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpidl.array import Array

WAITING = 1024  # losses of a GPU that are fetched at once: no step waits for them


class LossSum:
    """The sum of samples x mean loss over the steps of this rank; `before` are sums of others."""

    def __init__(self, before: Iterable[float] = ()) -> None:
        self.spoiled: int | None = None  #: the first step whose loss was no number, on the CPU
        self.samples = 0  #: added on this rank
        self._parts = list(before)
        self._before = exact.total(self._parts)
        self._new: list[tuple[Array, int]] = []

    def add(self, loss: Array, samples: int, step: int) -> None:
        """Count a mean `loss` of one element."""
        if self.spoiled is None and not is_device(loss) and not math.isfinite(loss.item()):
            self.spoiled = step
        self.samples += samples
        self._new.append((loss.reshape(()).copy(), samples))
        if len(self._new) == WAITING:
            self.parts()

    def parts(self) -> list[float]:
        """Return a few numbers, whose exact sum is that of all."""
        self._parts += [float(loss) * samples for loss, samples in self._new]
        self._new.clear()
        self._parts = exact.parts(self._parts)
        return self._parts

    def mean(self) -> float:
        """Return the mean over the samples added on this rank; NaN of none."""
        added = exact.total([*self.parts(), -self._before])
        return added / self.samples if self.samples else math.nan
