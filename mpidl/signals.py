"""SIGTERM and SIGUSR1: the wish that a run ends, and is started again later.

A cluster sends them before it takes the machines away. With `watching` they end nothing: the ranks
finish their step, and all know of the wish after it (`DataParallel.stop_requested`), whichever of
them got the signal.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpidl import abort, config

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN = "again"

_received: int | None = None


@contextmanager
def watching() -> Iterator[None]:
    """In this context let SIGTERM and SIGUSR1 only be noted. Not collective.

    In the main thread only: in another one this does nothing. Afterwards the handlers are those of
    before.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = None
    before: dict[signal.Signals, Any] = {}
    try:
        for number in SIGNALS:
            before[number] = signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not made by Python: it cannot be given back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def received() -> int | None:
    """Return the number of the signal that this rank got since `watching` began; None of none."""
    return _received


def leave() -> NoReturn:
    """End with the status 75, `config.EXIT_REQUEUE`: "start me again". Every rank calls it.

    It raises SystemExit: what stands in `finally` is done, and MPI ends in order. In the folder of
    a job (MPIDL_OUT) they leave the file `AGAIN`. Without it the job's script does not believe
    the status: a launcher may end with 75 for reasons of its own.
    """
    folder = config.job_folder()
    if folder is not None:  # each: the launcher's rank 0 may be gone
        with suppress(OSError):  # the script will say that it misses it
            (Path(folder) / AGAIN).touch()
    abort.leave_together(config.EXIT_REQUEUE)


def _note(number: int, _frame: Any) -> None:
    global _received
    _received = number
