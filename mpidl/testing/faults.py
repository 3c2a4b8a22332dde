"""What can go wrong, where and when."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, final

import numpy as np

from mpidl.array import namespace
from mpidl.errors import InvalidArgument
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.parallel import DataParallel

#: Within a step, in order:
#:   before  its gradient is there, and nothing of it was sent;
#:   reduce  a random number of blocks were averaged, and perhaps updated;
#:   update  all blocks of a random bucket were updated, and none were published;
#:   share   a random bucket was published;
#:   any     after a random part of a step's usual time, from the end of the step before on:
#:           anywhere, also in the midst of a call of MPI.
#: A number is so many seconds after the end of the step before: later steps, too.
MOMENTS = ("before", "reduce", "update", "share", "any")
TIMED = ("Kill", "Stop")  # those for which "any" and numbers are allowed

Rank: TypeAlias = "int | None"
Step: TypeAlias = "int | tuple[int, int]"
Moment: TypeAlias = "str | float"


class Fault(Protocol):
    """One fault on one rank.

    `rank` is the number at the start of the job (in MPI_COMM_WORLD), whatever it is called later;
    None for a random one. `step` counts updates from 0 on, as `DataParallel.steps`: the first one
    from there on that this rank takes part in; of a pair (first, last) one is drawn.
    """

    once: ClassVar[bool]  #: or at every step from `step` on

    @property
    def rank(self) -> Rank: ...  # noqa: D102

    @property
    def step(self) -> Step: ...  # noqa: D102

    @property
    def moment(self) -> Moment: ...  # noqa: D102

    def act(self, replica: DataParallel, rng: np.random.Generator, seconds: float) -> None:
        """Let it happen, now. `seconds` is what this rank has computed for since its last step."""


@final
@dataclass(frozen=True)
class Kill:
    """The rank is killed by SIGKILL; at a random time by SIGALRM, whose timer needs no thread."""

    rank: Rank = None
    step: Step = 0
    moment: Moment = "before"
    once: ClassVar[bool] = True

    @refuses
    def __post_init__(self) -> None:
        check(self)

    def act(self, replica: DataParallel, rng: np.random.Generator, seconds: float) -> None:
        """Do not return."""
        os.kill(os.getpid(), signal.SIGKILL)

    def after(self, delay: float) -> Callable[[], None]:
        """Let it happen after `delay` seconds. Returns how to prevent it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        return lambda: signal.setitimer(signal.ITIMER_REAL, 0) and None


@final
@dataclass(frozen=True)
class Stop:
    """The rank is stopped by SIGSTOP, and goes on after so many `seconds`; None for never."""

    rank: Rank = None
    step: Step = 0
    seconds: float | None = 1.0
    moment: Moment = "before"
    once: ClassVar[bool] = True

    @refuses
    def __post_init__(self) -> None:
        check(self)
        check_seconds(self, self.seconds)

    def act(self, replica: Any, rng: Any, seconds: float) -> None:
        """Return once it goes on."""
        self._stop()

    def after(self, delay: float) -> Callable[[], None]:
        """Let it happen after `delay` seconds. Returns how to prevent it."""
        timer = threading.Timer(delay, self._stop)
        timer.daemon = True
        timer.start()
        return timer.cancel

    def _stop(self) -> None:
        me = os.getpid()
        if self.seconds is None:
            os.kill(me, signal.SIGSTOP)
            return
        line = f"sleep {self.seconds:f}; kill -CONT {me}"
        with subprocess.Popen(["/bin/sh", "-c", line]):  # we cannot continue ourselves
            os.kill(me, signal.SIGSTOP)


@final
@dataclass(frozen=True)
class Slow:
    """Each step takes this rank so many `seconds` longer, or `factor` times the computing time.

    From `step` on, for `steps` of them; None for all.
    """

    rank: Rank = None
    step: Step = 0
    seconds: float = 0.0
    factor: float = 1.0
    steps: int | None = None
    moment: ClassVar[Moment] = "before"
    once: ClassVar[bool] = False

    @refuses
    def __post_init__(self) -> None:
        check(self)
        check_seconds(self, self.seconds)
        if not self.factor >= 1:
            raise InvalidArgument(f"{self}: expected a factor of 1 or more")

    def act(self, replica: Any, rng: Any, seconds: float) -> None:
        """Sleep."""
        time.sleep(self.seconds + (self.factor - 1) * seconds)


@final
@dataclass(frozen=True)
class Raise:
    """The rank raises `error`; of a text, RuntimeError(text)."""

    rank: Rank = None
    step: Step = 0
    error: BaseException | str = "injected by mpidl.testing"
    moment: Moment = "before"
    once: ClassVar[bool] = True

    @refuses
    def __post_init__(self) -> None:
        check(self)

    def act(self, replica: Any, rng: Any, seconds: float) -> None:
        """Raise it."""
        raise RuntimeError(self.error) if isinstance(self.error, str) else self.error


@final
@dataclass(frozen=True)
class Hang:
    """The rank waits and does nothing, for so many `seconds`; None for ever. It takes signals."""

    rank: Rank = None
    step: Step = 0
    seconds: float | None = None
    moment: Moment = "before"
    once: ClassVar[bool] = True

    @refuses
    def __post_init__(self) -> None:
        check(self)
        check_seconds(self, self.seconds)

    def act(self, replica: Any, rng: Any, seconds: float) -> None:
        """Wait."""
        end = np.inf if self.seconds is None else time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


@final
@dataclass(frozen=True)
class Corrupt:
    """So many random `bits` of this rank's gradients ("gradient"), or of "parameter", flip."""

    rank: Rank = None
    step: Step = 0
    bits: int = 1
    what: str = "gradient"
    moment: Moment = "before"
    once: ClassVar[bool] = True

    @refuses
    def __post_init__(self) -> None:
        check(self)
        if self.what not in ("gradient", "parameter"):
            raise InvalidArgument(f'{self}: expected what="gradient" or "parameter"')
        if not self.bits >= 1:
            raise InvalidArgument(f"{self}: expected 1 bit or more")

    def act(self, replica: DataParallel, rng: np.random.Generator, seconds: float) -> None:
        """Flip bits of buckets: none that only fill the space between arrays."""
        gradients = self.what == "gradient"
        views = [
            (flat.grad if gradients else flat.param)[part]
            for flat in replica.buckets
            for part in flat.slices().values()
        ]
        size = np.array([view.size for view in views], np.float64)
        for _ in range(self.bits):
            view = views[int(rng.choice(len(views), p=size / size.sum()))]
            kind = np.dtype(f"u{view.dtype.itemsize}")
            bit = kind.type(1) << kind.type(rng.integers(8 * kind.itemsize))
            words = view.view(kind)
            words[int(rng.integers(words.size))] ^= namespace(view).asarray(bit)


def check(fault: Fault) -> None:
    """Raise InvalidArgument for what cannot be in any fault."""
    rank, step, moment = fault.rank, fault.step, fault.moment
    pair = step if isinstance(step, tuple) else (step, step)
    if rank is not None and not (isinstance(rank, int) and rank >= 0):
        raise InvalidArgument(f"{fault}: expected a rank of 0 or more, or None")
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not 0 <= pair[0] <= pair[1]:
        raise InvalidArgument(f"{fault}: expected a step of 0 or more, or (first, last)")
    name = type(fault).__name__
    timed = moment == "any" or not isinstance(moment, str)
    if timed and name not in TIMED:
        raise InvalidArgument(f"{fault}: moment {moment!r} is for {', '.join(TIMED)} only")
    if isinstance(moment, str) and moment not in MOMENTS:
        known = ", ".join(MOMENTS)
        raise InvalidArgument(f"{fault}: expected a moment of {known}, or a number of seconds")
    if not isinstance(moment, str):
        check_seconds(fault, moment)


def check_seconds(fault: Fault, seconds: Any) -> None:
    """Raise InvalidArgument unless it is None, or a number of seconds."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 <= seconds < np.inf):
        raise InvalidArgument(f"{fault}: expected seconds, 0 or more")
