"""Where the time of this process goes: a clock that one thread switches from phase to phase.

What is not told to be something else is computation. Times are the host's: what is enqueued on a
GPU counts where the host waits for it.
"""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TypeVar

    T = TypeVar("T")
    Function = TypeVar("Function", bound=Callable[..., Any])

COMPUTE, DATA, WAIT, REDUCE, UPDATE, OTHER = range(6)
#: Their names: forward and backward; waiting for the next batch; waiting for other ranks; averaging
#: gradients and publishing parameters; the optimizer; all that is no training.
PHASES = ("compute", "data", "wait", "reduce", "update", "other")


class Listener(Protocol):
    """Is told of all that this clock sees; times are of `time.perf_counter`, in seconds."""

    def interval(self, phase: int, begin: float, end: float) -> None:
        """Note that this phase lasted so long."""

    def split(self, begin: float, end: float, seconds: Sequence[float]) -> None:
        """Note that phases took turns, too quickly to be told one by one: the seconds of each."""

    def step(self, number: int, end: float) -> None:
        """Note that update `number`, from 0 on, has been made."""


class Rows(Protocol):
    """Keeps what each step took."""

    def append(self, row: list[float]) -> None:
        """Keep the seconds in each phase, of one step."""


listener: Listener | None = None
seconds = [0.0] * len(PHASES)  #: in each phase, up to the last switch
history: Rows | None = None  #: of each step, where they are kept: see `record`
moved_bytes = 0  #: received from other ranks, or read in their memory, to average and publish

_phase, _since = OTHER, perf_counter()
_at_step = seconds.copy()
_folded = 0
_get_ident = threading.get_ident
_thread = _get_ident()


def switch(phase: int) -> int:
    """Let time count for `phase` from now on, and return the phase before. Not collective.

    In other threads than the one that trains it does nothing: their time is nobody's.
    """
    global _phase, _since
    before = _phase
    if _get_ident() != _thread or phase == before:
        return before
    now = perf_counter()
    seconds[before] += now - _since
    if listener is not None and not _folded:
        listener.interval(before, _since, now)
    _phase, _since = phase, now
    return before


def take_thread() -> None:
    """Let this thread be the one that trains: the clock is its own from here on, in OTHER."""
    global _thread, _since
    if _thread != _get_ident():
        _thread, _since = _get_ident(), perf_counter()
    switch(OTHER)


@contextmanager
def lent() -> Iterator[None]:
    """Let this thread switch the clock, while the one that trains waits for it."""
    global _thread
    owner, _thread = _thread, _get_ident()
    try:
        yield
    finally:
        _thread = owner


def read() -> list[float]:
    """Return the seconds in each phase up to now."""
    found = seconds.copy()
    found[_phase] += perf_counter() - _since
    return found


def step(number: int) -> None:
    """Note that update `number`, from 0 on, has been made."""
    global _at_step
    if (history is None and listener is None) or _get_ident() != _thread:
        return
    now = read()
    if history is not None:
        history.append([a - b for a, b in zip(now, _at_step, strict=True)])
    _at_step = now
    if listener is not None:
        listener.step(number, perf_counter())


def record(rows: Rows | None) -> None:
    """Keep what each step takes in `rows`, from here on; with None no more."""
    global history, _at_step
    history, _at_step = rows, read()


@contextmanager
def folded() -> Iterator[None]:
    """Tell the listener of what happens in here as a whole: phases that change often."""
    global _folded, _since
    if listener is None or _folded or _get_ident() != _thread:
        yield
        return
    _flush()
    begin, before = _since, seconds.copy()
    _folded = 1
    try:
        yield
    finally:
        _flush()
        _folded = 0
        if listener is not None:
            spent = [a - b for a, b in zip(seconds, before, strict=True)]
            listener.split(begin, _since, spent)


def _flush() -> None:
    """Count the phase that goes on up to now, and tell of it."""
    global _since
    now = perf_counter()
    seconds[_phase] += now - _since
    if listener is not None and not _folded:
        listener.interval(_phase, _since, now)
    _since = now


def fetched(items: Iterable[T]) -> Iterator[T]:
    """Yield what `items` yields; the time that this takes is that of data."""
    iterator = iter(items)
    while True:
        before = switch(OTHER if _phase == OTHER else DATA)  # as in an evaluation
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            switch(before)
        yield item


def counted(phase: int) -> Callable[[Function], Function]:
    """Return a decorator: the time of each call counts for `phase`, but where that is switched."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            before = switch(phase)
            try:
                return function(*args, **options)
            finally:
                switch(before)

        return timed  # type: ignore[return-value]

    return decorate
