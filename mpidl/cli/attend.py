"""Waiting for Open MPI's launcher, so that SIGTERM leaves the ranks time for a checkpoint.

Measured with Open MPI 5.0.11: a quarter of a second after mpirun gets SIGTERM it sends it to the
ranks, and SIGKILL a quarter of a second later; no option changes that. SIGUSR1 it only passes on.
(MPICH's mpiexec passes both on, and waits.) So SIGTERM becomes SIGUSR1 on its way, once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SI_KERNEL = 128  # of asm-generic/siginfo.h: from the terminal, to the launcher too
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LOOK_SECONDS, LOOKS = 2.0, 3  # how often to look at the launcher's children, and how often for none


def run(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the launcher, and return its exit status; ends by the signal that ended it.

    Where this process is killed, the launcher gets SIGTERM. Signals must not be caught elsewhere.
    A launcher that has no ranks any more, and does not end, is killed: status 1. (Seen once in some
    hundred runs of Open MPI 5.0.11 with fault tolerance, after several ranks had called MPI_Abort
    at once. It then heeds no SIGTERM.)
    """
    awaited = (*PASSED_ON, signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # sigwaitinfo takes them
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be here, it never comes
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def begin() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    child = subprocess.Popen(line, env=environment, preexec_fn=begin)  # one thread: it may be so
    asked = begun = False
    alone = 0
    while child.poll() is None:
        found = signal.sigtimedwait(awaited, LOOK_SECONDS)
        if found is None:
            has_ranks = has_children(child.pid)
            begun, alone = begun or has_ranks, 0 if has_ranks or not begun else alone + 1
            if alone == LOOKS:
                child.kill()
                child.wait()
                print("mpidl: the launcher did not end after its ranks", file=sys.stderr)
                child.returncode = 1
            continue
        number = signal.Signals(found.si_signo)
        if number == signal.SIGCHLD or found.si_code == SI_KERNEL:
            continue
        if number == signal.SIGTERM and not asked:
            asked, number = True, signal.SIGUSR1
        with suppress(ProcessLookupError):
            child.send_signal(number)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if child.returncode >= 0:
        return child.returncode
    signal.signal(-child.returncode, signal.SIG_DFL)
    os.kill(os.getpid(), -child.returncode)
    return 128 - child.returncode


@contextmanager
def status_file() -> Iterator[tuple[str, Callable[[], int]]]:
    """Give a file for ranks that end the run to write their status into, and how to read it."""
    with tempfile.NamedTemporaryFile(prefix="mpidl-status-") as file:

        def told() -> int:
            words = Path(file.name).read_text().split()
            return int(words[0]) if words else 0

        yield file.name, told


def has_children(pid: int) -> bool:
    """Whether a process has children: at worst a few milliseconds, with thousands of processes."""
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may have ended
            state, parent = place.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                return True
    return False
