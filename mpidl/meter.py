"""How a fit goes on, as rank 0 sees it. Nothing is sent for it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.loss_sum import LossSum


@dataclass(frozen=True)
class Reading:
    """What there was since an earlier reading, or since the beginning."""

    step: int  #: updates of this fit
    count: int  #: updates since then
    samples_per_second: float  #: of all ranks together
    loss: float  #: mean over this rank's samples since then; NaN without any
    seconds: list[float]  #: in each phase of `mpidl.clock`, in all since then


class Meter:
    """Counts the `steps` updates of a fit, and their samples; `losses` returns this epoch's."""

    def __init__(self, steps: int, losses: Callable[[], LossSum] | None = None) -> None:
        self.steps, self.done, self.samples = steps, 0, 0
        self._losses = losses
        self._start = self._mark()

    def step(self, samples: int) -> None:
        """Count an update, made of `samples` samples of all ranks."""
        self.done += 1
        self.samples += samples

    def begin(self) -> Since:
        """Return what makes a reading of all that follows."""
        return Since(self)

    @property
    def samples_per_second(self) -> float:
        """Of all ranks, since the beginning."""
        spent = time.perf_counter() - self._start.time
        return self.samples / spent if spent > 0 else 0.0

    @property
    def waiting(self) -> float:
        """The share of the time since the beginning that this rank waited for others."""
        phases = [a - b for a, b in zip(clock.read(), self._start.seconds, strict=True)]
        return phases[clock.WAIT] / sum(phases) if sum(phases) > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """If the rest goes on like this; None before the first step."""
        spent = time.perf_counter() - self._start.time
        return spent / self.done * (self.steps - self.done) if self.done else None

    def _mark(self) -> _Mark:
        losses = None if self._losses is None else self._losses()
        total = (0.0, 0)
        if losses is not None and losses.samples:
            total = losses.mean() * losses.samples, losses.samples
        return _Mark(time.perf_counter(), self.done, self.samples, losses, *total, clock.read())


@dataclass(frozen=True)
class _Mark:
    time: float
    done: int
    samples: int
    losses: LossSum | None  #: of the epoch then
    loss: float  #: their sum, of this rank's samples
    count: int  #: these samples
    seconds: list[float]


class Since:
    """Reads a meter from time to time; each reading begins where the one before ended."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last = meter._mark()

    def seconds(self) -> float:
        """Return how long ago the last reading was."""
        return time.perf_counter() - self._last.time

    def read(self) -> Reading:
        """Return what there was since the last reading."""
        last, now = self._last, self._meter._mark()
        self._last = now
        same = now.losses is last.losses  # else another epoch has begun
        loss, count = (
            (now.loss - last.loss, now.count - last.count) if same else (now.loss, now.count)
        )
        spent = now.time - last.time
        return Reading(
            step=now.done,
            count=now.done - last.done,
            samples_per_second=(now.samples - last.samples) / spent if spent > 0 else 0.0,
            loss=loss / count if count else math.nan,
            seconds=[a - b for a, b in zip(now.seconds, last.seconds, strict=True)],
        )
