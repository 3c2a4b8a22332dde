"""What a rank is waiting in, noted so that others can read it."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.errors import MpidlError, RankMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import FrameType

PACKAGE = str(Path(__file__).parent) + os.sep
STACK_LINES = 8
DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy")

_all: weakref.WeakSet[Mark] = weakref.WeakSet()
_lock = threading.Lock()


class Mark:
    """What one thread of this rank is doing in the collectives of `comm`.

    Written by that thread, and read by the watchdog's. Nothing here is locked, and no clock is
    read: a mark takes less than a tenth of the shortest collective. Each call is counted, so that
    ranks can be compared: all make the same calls in the same order (MPI-4.1, section 6.14).
    """

    __slots__ = ("__weakref__", "calls", "checks", "comm", "doing", "progress")

    def __init__(self, comm: Any = None, *, checks: bool = False) -> None:
        self.comm = comm
        self.checks = checks  #: whether each call is compared over ranks before it is made
        self.calls = 0  #: that were begun
        self.progress = 0  #: grows while a call that takes long goes on
        self.doing: list[tuple[str, tuple[Any, ...]]] = []  #: the calls it is in, innermost last
        with _lock:
            _all.add(self)

    def enter(self, call: str, about: tuple[Any, ...] = ()) -> Mark:
        """Note the beginning of a call: a format string, and what goes into it. Collective.

        For use in a `with`; or, which is quicker, with `leave` in a `finally`.

        With `checks`, raises RankMismatch on every rank where the ranks make different calls.
        """
        self.calls += 1
        self.doing.append((call, about))
        if self.checks:
            try:
                self.compare()
            except BaseException:
                self.doing.pop()
                raise
        return self

    def note(self, call: str, about: tuple[Any, ...] = ()) -> Mark:
        """Note the beginning of a wait that is not collective."""
        self.doing.append((call, about))
        return self

    def at(self, call: str, about: tuple[Any, ...] = ()) -> None:
        """Say anew what the innermost call is doing: it goes on, if slowly."""
        self.progress += 1
        if self.doing:
            self.doing[-1] = call, about

    def leave(self) -> None:
        """Note its end."""
        self.doing.pop()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.doing.pop()

    def told(self) -> str:
        """Return the calls it is in, outermost first; empty where it is in none. In any thread."""
        return ": ".join(call.format(*about) for call, about in tuple(self.doing))

    def compare(self) -> None:
        """Raise RankMismatch on every rank unless all are about to do the same. Collective."""
        if self.comm is None or self.comm.size == 1:
            return
        found = self.comm.allgather((self.told(), site(sys._getframe())))
        if len({told for told, _ in found}) == 1:
            return
        calls = by_rank({rank: f"{told} at {at}" for rank, (told, at) in enumerate(found)})
        raise shared(RankMismatch(f"the ranks make different calls: {calls}"))


def everywhere() -> list[Mark]:
    """Return all marks of this process."""
    with _lock:
        return list(_all)


def some(ranks: Iterable[int]) -> str:
    """Return "rank 3", "ranks 0, 2"; no more than the first eight."""
    listed = sorted(ranks)
    text = ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else "")
    return f"rank{'s' * (len(listed) != 1)} {text}"


def by_rank(values: Mapping[int, Any]) -> str:
    """Return "ranks 0, 2: this; rank 1: that"."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return "; ".join(f"{some(who)}: {value}" for value, who in ranks.items())


def shared(error: MpidlError) -> MpidlError:
    """Note that every rank raises this."""
    error.collective = True
    return error


def site(frame: FrameType | None) -> str:
    """Return "train.py:12": the innermost of a frame and its callers that is not of mpidl."""
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "the end of the script" if frame is None else _place(frame)


def stack(frame: FrameType | None) -> list[str]:
    """Return a line for a frame and each of its callers, outermost first.

    But how the script was started (runpy, mpi4py): its module is `__main__`. Of a long stack, the
    outer half is cut short.
    """
    lines = []
    while frame is not None:
        code = frame.f_code
        lines.append(f"{_place(frame)} in {code.co_name}{_source(frame)}")
        if code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            break
        frame = frame.f_back
    lines.reverse()
    if len(lines) > STACK_LINES:
        lines[2 : 3 - STACK_LINES] = [f"... {len(lines) - STACK_LINES + 1} more"]
    return lines


def main_frame() -> FrameType | None:
    """Return the frame that the main thread is in."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def in_debugger(frame: FrameType | None) -> bool:
    """Whether a person is looking at this frame, or at one of its callers."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).split(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _source(frame: FrameType) -> str:
    line = traceback.FrameSummary(frame.f_code.co_filename, frame.f_lineno, "").line
    return f": {line}" if line else ""
