"""A process that is spawned in the place of a rank that was killed, as rank 0 knows it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.spawned import TAG

if TYPE_CHECKING:
    import threading

JOIN, DONE, LEAVE = "join", "done", "leave"
PASSED_ON = ("LD_LIBRARY_PATH", "MKL_", "MPI4PY_", "MPIDL_", "OMP_", "OPENBLAS_", "PYTHON")
FOLDER = Path.cwd()  # where the script was started


@dataclass
class Newcomer:
    """A process that was spawned, as rank 0 knows it."""

    number: int  #: of the rank whose place it takes
    pair: Any = None  #: communicator of rank 0 and it
    problem: str | None = None
    thread: threading.Thread | None = None
    asks: Any = None  #: what it has sent, and waits for an answer to
    unwanted: bool = False
    begun: float = field(default_factory=time.monotonic)

    @property
    def starting(self) -> bool:
        """Whether it is not known yet what became of it."""
        return self.thread is not None and self.thread.is_alive()

    def look(self) -> None:
        """Find out whether it asks for something, or has died. Not collective."""
        try:
            if self.problem is None and self.pair.Iprobe(1, TAG):
                self.asks = self.pair.recv(None, 1, TAG)
        except Exception:  # of MPI
            self.problem = "it ended before it came to its fit"

    def answer(self, what: Any) -> None:
        """Answer what it has asked."""
        self.asks = None
        try:
            self.pair.send(what, 1, TAG)
        except Exception:  # of MPI
            self.problem = "it ended while it joined"

    def dismiss(self, seconds: float) -> None:
        """Let it end. Waits for so long at most, where it is starting."""
        self.unwanted = True
        if self.thread is not None:
            self.thread.join(seconds)
        if not self.starting and self.pair is not None:
            self.answer((LEAVE, None))


def spawn(newcomer: Newcomer, MPI: Any, told: dict[str, Any], host: str | None) -> None:
    """Start a process, and tell it who it is. Returns when its MPI has started."""
    process = f"{os.getpid()} {os.uname().nodename}"
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    passed["MPIDL_SPAWNED"] = process
    # values of MPI_Info are short: so env(1) sets the environment
    line = [*(f"{name}={value}" for name, value in passed.items()), sys.executable]
    try:
        info = MPI.Info.Create()
        info.Set("wdir", str(FOLDER))
        if host is not None:
            info.Set("host", host)
        inter = MPI.COMM_SELF.Spawn("/usr/bin/env", [*line, *sys.orig_argv[1:]], 1, info)
        pair = inter.Merge(high=False)
        pair.send(told, 1, TAG)
        newcomer.pair = pair
        if newcomer.unwanted:
            newcomer.answer((LEAVE, None))
    except Exception as error:  # of MPI
        newcomer.problem = f"MPI_Comm_spawn: {error}"
