"""Rates as functions of the step, and batch sizes as functions of the epoch.

Each is called with t, the number of updates made before, from 0. They are small dataclasses: they
can be compared and pickled, and `repr` gives them back as they were written.
"""
# ruff: noqa: N801 - one calls them as functions, twice

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.errors import InvalidArgument
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.optim.base import Rate


@dataclass(frozen=True)
class constant:
    """lr."""

    lr: float

    @refuses
    def __post_init__(self) -> None:
        _rates(self, lr=self.lr)

    @refuses
    def __call__(self, _step: int) -> float:
        """Return the rate."""
        return self.lr


@dataclass(frozen=True)
class inverse:
    """lr / (1 + decay t)^power."""

    lr: float
    decay: float
    power: float = 1.0

    @refuses
    def __post_init__(self) -> None:
        _rates(self, lr=self.lr, decay=self.decay, power=self.power)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        return self.lr / (1 + self.decay * step) ** self.power


@dataclass(frozen=True)
class exponential:
    """lr decay^(t / steps)."""

    lr: float
    decay: float
    steps: int = 1

    @refuses
    def __post_init__(self) -> None:
        _rates(self, lr=self.lr)
        _fraction(self, decay=self.decay)
        _counts(self, steps=self.steps)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        return float(self.lr * self.decay ** (step / self.steps))


@dataclass(frozen=True)
class polynomial:
    """end + (lr - end) (1 - t / steps)^power, and `end` from t = steps on."""

    lr: float
    steps: int
    end: float = 0.0
    power: float = 1.0

    @refuses
    def __post_init__(self) -> None:
        _rates(self, lr=self.lr, end=self.end, power=self.power)
        _counts(self, steps=self.steps)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        if step >= self.steps:
            return self.end
        left = (1 - step / self.steps) ** self.power
        return float(self.end + (self.lr - self.end) * left)


@dataclass(frozen=True)
class multi_step:
    """lr factor^k, where k of the steps `at` are reached, t >= at."""

    lr: float
    at: tuple[int, ...]
    factor: float = 0.1

    @refuses
    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        _rates(self, lr=self.lr, factor=self.factor)
        _rising(self, self.at)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        return float(self.lr * self.factor ** _reached(self.at, step))


@dataclass(frozen=True)
class cosine:
    """end + (lr - end) (1 + cos(pi t / steps)) / 2, and `end` from t = steps on.

    Loshchilov and Hutter 2017, equation 5, without restarts.
    """

    lr: float
    steps: int
    end: float = 0.0

    @refuses
    def __post_init__(self) -> None:
        _rates(self, lr=self.lr, end=self.end)
        _counts(self, steps=self.steps)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        turn = math.pi * min(step / self.steps, 1)
        return self.end + (self.lr - self.end) * (1 + math.cos(turn)) / 2


@dataclass(frozen=True)
class triangular:
    """low + (high - low) x: x goes from 0 to 1 in `half` steps, and back in as many, for ever.

    Smith 2017, section 3.2.
    """

    low: float
    high: float
    half: int

    @refuses
    def __post_init__(self) -> None:
        _rates(self, low=self.low, high=self.high)
        _counts(self, half=self.half)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        return self.low + (self.high - self.low) * _triangle(step, self.half)


@dataclass(frozen=True)
class triangular2:
    """As `triangular`, with high - low halved after each cycle of 2 x `half` steps (Smith 2017)."""

    low: float
    high: float
    half: int

    @refuses
    def __post_init__(self) -> None:
        _rates(self, low=self.low, high=self.high)
        _counts(self, half=self.half)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        height = (self.high - self.low) * 0.5 ** (step // (2 * self.half))
        return self.low + height * _triangle(step, self.half)


@dataclass(frozen=True)
class exp_range:
    """As `triangular`, with high - low times decay^t (Smith 2017)."""

    low: float
    high: float
    half: int
    decay: float

    @refuses
    def __post_init__(self) -> None:
        _rates(self, low=self.low, high=self.high)
        _counts(self, half=self.half)
        _fraction(self, decay=self.decay)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        height = (self.high - self.low) * self.decay**step
        return float(self.low + height * _triangle(step, self.half))


@dataclass(frozen=True)
class warm_up:
    """A straight line from `start` to schedule(steps), and schedule(t) from t = steps on.

    So milestones count from the start of training (Goyal et al. 2017, section 2.2).
    """

    schedule: Rate
    steps: int
    start: float = 0.0

    @refuses
    def __post_init__(self) -> None:
        _rates(self, start=self.start, **_number(self.schedule))
        _counts(self, steps=self.steps)

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        if step >= self.steps:
            return _at(self.schedule, step)
        return self.start + (_at(self.schedule, self.steps) - self.start) * step / self.steps


@dataclass(frozen=True)
class scaled:
    """factor x schedule(t)."""

    schedule: Rate
    factor: float

    @refuses
    def __post_init__(self) -> None:
        _rates(self, factor=self.factor, **_number(self.schedule))

    @refuses
    def __call__(self, step: int) -> float:
        """Return the rate at `step`."""
        return self.factor * _at(self.schedule, step)


@refuses
def linear_scaling(lr: Rate, *, ranks: int, warm_up_steps: int = 0) -> Rate:
    """Return ranks x lr: the rate for a global batch `ranks` times that which `lr` was found with.

    Goyal et al. 2017, section 2.1. Large rates need a start of small ones, from lr on (section
    2.2): `warm_up_steps`, as many as five epochs have. `batch_size` in mpidl counts the samples of
    all ranks, so multiply it by `ranks`, too. Raises InvalidArgument for counts out of range.
    """
    if ranks < 1 or warm_up_steps < 0:
        raise InvalidArgument(
            f"linear_scaling({ranks=}, {warm_up_steps=}): expected 1 rank and 0 steps, or more"
        )
    fast: Rate = scaled(lr, ranks) if callable(lr) else ranks * lr
    return warm_up(fast, warm_up_steps, start=_at(lr, 0)) if warm_up_steps else fast


@dataclass(frozen=True)
class growing_batch:
    """size factor^k samples, rounded, where k of the epochs `at` are reached; epochs count from 0.

    For `Trainer.fit(batch_size=...)`. Where the rate would be divided by `factor`, the batch grows
    by it instead: the same curve in fewer updates (Smith et al. 2018). Not beyond `limit`, which
    the length of the data set must not be below.
    """

    size: int
    at: tuple[int, ...]
    factor: float = 5.0
    limit: int | None = None

    @refuses
    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        _counts(self, size=self.size, **({} if self.limit is None else {"limit": self.limit}))
        _rising(self, self.at)
        if not 1 <= self.factor < math.inf:
            raise InvalidArgument(f"{self}: expected 1 <= factor < inf")

    @refuses
    def __call__(self, epoch: int) -> int:
        """Return the global batch's number of samples in `epoch`."""
        size = round(self.size * self.factor ** _reached(self.at, epoch))
        return size if self.limit is None else min(size, self.limit)


def _at(schedule: Rate, step: int) -> float:
    return float(schedule(step) if callable(schedule) else schedule)


def _number(schedule: Rate) -> dict[str, float]:
    return {} if callable(schedule) else {"schedule": schedule}


def _triangle(step: int, half: int) -> float:
    """Return 1 at odd multiples of `half`, 0 at even ones, and straight lines between them."""
    return 1 - abs(step % (2 * half) / half - 1)


def _reached(at: tuple[int, ...], now: int) -> int:
    return sum(now >= a for a in at)


def _rates(schedule: object, /, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InvalidArgument(f"{schedule}: expected 0 <= {name} < inf")


def _fraction(schedule: object, /, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise InvalidArgument(f"{schedule}: expected 0 < {name} <= 1")


def _counts(schedule: object, /, **values: int) -> None:
    for name, value in values.items():
        if value != int(value) or value < 1:
            raise InvalidArgument(f"{schedule}: expected {name} to be a whole number, 1 or more")


def _rising(schedule: object, at: tuple[int, ...]) -> None:
    if any(a >= b for a, b in zip((-1, *at), at, strict=False)):
        raise InvalidArgument(f"{schedule}: expected steps from 0 on, each above the one before")
