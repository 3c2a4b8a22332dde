"""Ranks fail together: one that ends by an error ends the whole job within seconds.

Without this the other ranks would wait for the failed one for ever: MPI_Finalize, which Python
reaches after an exception or `sys.exit(1)`, is collective (MPI-4.1, section 11.2.2).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn

PRINT_SECONDS = 3.0  # time for rank 0 to print an error that all ranks share, and end them
INTERRUPTED = 130  # the shell's exit status after Ctrl-C

_guard: _Guard | None = None


def install(comm: Any, host: str) -> None:
    """From now on, end all ranks of `comm` when this one ends by an error."""
    global _guard
    if _guard is None:
        _guard = _Guard(comm, host)
    _guard.wanted = True


def uninstall() -> None:
    """Leave errors alone again."""
    if _guard is not None:
        _guard.wanted = False


class _Guard:
    def __init__(self, comm: Any, host: str) -> None:
        self.comm, self.host = comm, host
        self.wanted = True
        self.process = os.getpid()
        self.exit_code = 0
        self.previous_hook, sys.excepthook = sys.excepthook, self.on_error
        self.previous_thread_hook = threading.excepthook
        threading.excepthook = self.on_thread_error
        # SystemExit passes no hook. Library code (argparse, click) leaves through sys.exit.
        self.previous_exit = sys.exit
        sys.exit = self.on_exit
        atexit.register(self.at_exit)  # runs before mpi4py calls MPI_Finalize

    @property
    def active(self) -> bool:
        """Not in a forked child, a loader's worker, say: it is no rank."""
        return self.wanted and os.getpid() == self.process

    def on_error(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not self.active:
            self.previous_hook(kind, error, trace)
            return
        if issubclass(kind, KeyboardInterrupt):
            self.abort(INTERRUPTED)
        if isinstance(error, MpidlError) and error.collective and self.comm.rank != 0:
            time.sleep(PRINT_SECONDS)  # we outlive this only if rank 0 caught it
        head = f"mpidl: rank {self.comm.rank} of {self.comm.size} on {self.host} failed\n"
        text = head + "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.flush()
        os.write(2, text.encode(errors="replace"))  # in one piece, also beside other ranks
        self.abort(1)

    def on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        if not self.active or args.exc_value is None:
            self.previous_thread_hook(args)
        elif not issubclass(args.exc_type, SystemExit):
            self.on_error(args.exc_type, args.exc_value, args.exc_traceback)

    def on_exit(self, status: Any = None) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            self.exit_code = status if isinstance(status, int) else int(status is not None)
        raise SystemExit(status)

    def at_exit(self) -> None:
        if self.active and self.exit_code:
            self.abort(self.exit_code)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)
