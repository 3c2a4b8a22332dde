"""Ranks fail together: one that ends by an error ends the whole job within seconds.

Without this the other ranks would wait for the failed one for ever: MPI_Finalize, which Python
reaches after an exception or `sys.exit(1)`, is collective (MPI-4.1, section 11.2.2).
"""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl import config
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn

PRINT_SECONDS = 3.0  # time for rank 0 to print an error that all ranks share, and end them
TOLD = 32767  # a tag: the largest that every MPI has (MPI-4.1, section 9.1.2)
PROBES = 100  # the first only lets the message arrive
SEGMENTS = ("/dev/shm/sm_segment.", "/dev/shm/mpich_shm_")  # of Open MPI and MPICH
LAST = "last"
INTERRUPTED = 130  # the shell's exit status after Ctrl-C

_guard: _Guard | None = None
_process = os.getpid()
_agreed: int | None = None  # the status with which all ranks are leaving together
_noted: int | None = None  # that of a run that otherwise ends well
_statuses: list[int] = []  # of `watch`
_before: list[Callable[[], object]] = []  # of `before`
counts = True  #: whether the run fails where this rank does: one that is to join may
_barrier: Any = None  # communicator, where ranks have died: for the end, in place of MPI_Finalize


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


def before(function: Callable[[], object]) -> None:
    """Call `function` before this rank ends all others: nothing runs after that."""
    _before.append(function)


def replace(comm: Any) -> None:
    """Let errors end the ranks of `comm` instead: others have died."""
    if _guard is not None:
        _guard.comm = comm


def end_without_finalizing(comm: Any) -> None:
    """Let this process end after a barrier: MPI_Finalize may hang after others have died."""
    global _barrier, _process
    _barrier, _process = comm, os.getpid()
    note_status(1)


def note_status(status: int, *, last: bool = False) -> None:
    """Tell `mpidl run`, if it is on this host, with which status the run ends, as it stands.

    Nothing changes what is written as the `last` word. Open MPI's launcher may return 0 for
    whatever comes after a rank's death.
    """
    path = config.status_file()
    if path is None or not counts:
        return
    with suppress(OSError), path.open("r+") as file:  # on other hosts there is none
        if LAST not in file.read():
            file.seek(0)
            file.write(f"{status:3} {LAST if last else '    '}\n")


def leave_together(status: int) -> NoReturn:
    """Leave by SystemExit with a status that all ranks have agreed on. Every rank calls it.

    Nobody is aborted: each rank runs to its own end, and MPI ends in order.
    """
    global _agreed, _process
    _agreed, _process = status, os.getpid()
    raise _Exit(status)


def end_with(status: int | None) -> None:
    """Let a run that ends well end with this status; None for 0. Every rank calls it."""
    global _noted, _process
    _noted, _process = status, os.getpid()


def leaving() -> bool:
    """Whether this rank leaves with a status that all have agreed on."""
    return _agreed is not None and _Exit.final == _agreed


def final_status() -> int | None:
    """Return the status with which this rank is about to end well; None where an error ends it."""
    if leaving():
        return _agreed
    failed = _Exit.final not in (None, 0) or ends_all() or hasattr(sys, "last_value")
    return None if failed else _noted or 0


def failing() -> bool:
    """Whether this process is ending by an error."""
    return final_status() is None


def _end_together() -> None:
    """End with the status agreed on, after MPI: what is registered after this runs before it."""
    status = _agreed if leaving() else _noted if _Exit.final in (None, 0) else None
    if os.getpid() != _process or _guard is None:
        return
    if _barrier is None and not status:
        return
    if status is None and failing():  # `at_exit` ends the job
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    MPI = sys.modules["mpi4py.MPI"]
    if _barrier is not None:
        with suppress(Exception):  # another one has died
            _barrier.Barrier()
        unlink_segments()
        note_status(status or 0)
    elif not MPI.Is_finalized():
        MPI.Finalize()
    os._exit(status or 0)  # Python knows no other way to change it here


atexit.register(_end_together)


def watch(MPI: Any) -> None:
    """Hear of `raise SystemExit(n)`, which mpi4py's runner tells to MPI alone, from now on."""
    tell = getattr(MPI, "_set_abort_status", None)
    if tell is None or hasattr(tell, "__wrapped__"):
        return

    def told(status: int) -> None:
        _statuses.append(status)
        tell(status)

    told.__wrapped__ = tell  # type: ignore[attr-defined]
    MPI._set_abort_status = told


def ends_all() -> bool:
    """Return whether this process ends by an error that `watch` heard of, and ends all others."""
    return bool(_statuses)


class _Exit(SystemExit):
    """What `sys.exit` raises; it may still be caught, and then nothing has ended.

    Uncaught it passes no hook. But the interpreter then asks for its `code`, from outside any
    Python frame, and so tells that this process ends, and how.
    """

    final: Any = None

    def __init__(self, status: Any) -> None:
        super().__init__(status)
        self.status = status

    @property
    def code(self) -> Any:  # type: ignore[override]
        """The status, as with any SystemExit."""
        if sys._getframe().f_back is None:
            _Exit.final = self.status
        return self.status


def _exit(status: Any = None) -> NoReturn:
    main = threading.current_thread() is threading.main_thread()
    raise _Exit(status) if main else SystemExit(status)


class _Guard:
    def __init__(self, comm: Any, host: str) -> None:
        self.comm, self.host = comm, host
        self.wanted = True
        self.process = os.getpid()
        self.previous_hook, sys.excepthook = sys.excepthook, self.on_error
        self.previous_thread_hook = threading.excepthook
        threading.excepthook = self.on_thread_error
        # Most code (argparse, click) leaves through sys.exit. For `raise SystemExit(1)`,
        # `mpidl run` starts scripts through mpi4py, which sees it.
        sys.exit = builtins.exit = builtins.quit = _exit  # type: ignore[assignment]
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
        shared = isinstance(error, MpidlError) and error.collective
        if shared and self.comm.rank != 0:
            time.sleep(PRINT_SECONDS)  # we outlive this only if rank 0 caught it, or is slow
            if self.told():
                self.abort(1)
        head = f"mpidl: rank {self.comm.rank} of {self.comm.size} on {self.host} failed\n"
        text = head + "".join(traceback.format_exception(kind, error, _of_script(trace)))
        os.write(2, text.encode(errors="replace"))  # in one piece, also beside other ranks
        if shared and self.comm.rank == 0:
            self.tell()
        self.abort(1)

    def tell(self) -> None:
        """Let all others know that rank 0 has printed the error that they share."""
        with suppress(Exception):  # an MPI that has failed
            for rank in range(1, self.comm.size):
                self.comm.Isend(bytearray(0), rank, TOLD)

    def told(self) -> bool:
        """Return whether it has."""
        try:
            return any(self.comm.Iprobe(0, TOLD) for _ in range(PROBES))
        except Exception:  # as there
            return False

    def on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        if not self.active or args.exc_value is None:
            self.previous_thread_hook(args)
        elif not issubclass(args.exc_type, SystemExit):
            self.on_error(args.exc_type, args.exc_value, args.exc_traceback)

    def at_exit(self) -> None:
        status = _Exit.final
        if self.active and status not in (None, 0) and not leaving():
            self.abort(status if isinstance(status, int) else 1)

    def abort(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # it may be closed, or anything that can be written to
                stream.flush()
        for function in (*_before, unlink_segments):
            with suppress(Exception):
                function()
        status = status & 255 or 1  # the system keeps 8 bits: 256 would be success
        note_status(status, last=True)
        self.comm.Abort(status)


def unlink_segments() -> None:
    """Remove the names of memory that MPI shares here: without MPI_Finalize they would stay."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            name = line[line.find("/") :] if "/" in line else ""
            if name.startswith(SEGMENTS):
                with suppress(OSError):
                    Path(name).unlink()


def _of_script(trace: TracebackType | None) -> TracebackType | None:
    """Leave out how the script was started (runpy, mpi4py): the last module `__main__` is it."""
    start, frame = trace, trace
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_name == "<module>" and frame.tb_frame.f_globals.get("__name__") == "__main__":
            start = frame
        frame = frame.tb_next
    return start
