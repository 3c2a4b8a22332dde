"""A rank that was spawned in the place of one that died: what it is told of the others.

It runs the user's script from its beginning, as all did, and has the dead one's number; but it is
alone until its trainer joins the others (`mpidl.replacement`). Until then collective calls return
what it alone contributes.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpidl import abort, config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.world import World

TAG = 1
START_SECONDS = 30.0  # that MPI_Init may take, in which the one that spawned it may have died
JOIN_SECONDS = 30.0  # that joining may take, which MPI may leave without an end where ranks die
LOOK_SECONDS = 5e-3

parent: Parent | None = None  #: None in all others, and once it has joined


@dataclass
class Parent:
    """The rank that has spawned this one."""

    comm: Any  #: mpi4py.MPI.Intracomm of the two: it is 0 there, and this one 1
    process: str  #: "PID HOST"
    told: dict[str, Any]  #: of the first world: what the dead rank knew, and "hosts"

    def ask(self, what: Any) -> Any:
        """Send something, and return the answer; end where there will be none."""
        try:
            self.comm.send(what, 0, TAG)
            while not self.comm.Iprobe(0, TAG):
                if not alive(self.process):
                    leave()
                time.sleep(LOOK_SECONDS)
            return self.comm.recv(None, 0, TAG)
        except Exception:  # of MPI: it has died
            leave()


@contextmanager
def at_most(seconds: float, process: str) -> Iterator[None]:
    """End this process unless this context ends in time, or if `process` has ended meanwhile."""
    done = threading.Event()

    def look() -> None:
        end = time.monotonic() + seconds
        while not done.wait(LOOK_SECONDS * 10):
            late = time.monotonic() > end or not alive(process)
            if late and not done.wait(1.0):
                leave()

    threading.Thread(target=look, name="mpidl joins", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def leave() -> NoReturn:
    """End at once, and quietly: nobody needs this rank."""
    os._exit(0)


def alive(process: str) -> bool:
    """Whether "PID HOST" is there, as far as this host can tell."""
    pid, host = process.split(" ", 1)
    return host != os.uname().nodename or Path(f"/proc/{pid}").exists()


def before_start() -> None:
    """Get ready for MPI_Init, which waits for the one that has spawned this process."""
    process = config.spawned()
    if process is None:
        return
    if not alive(process):
        leave()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)


def named(world: World) -> World:
    """Return the world of one rank as the one whose place this process takes knew its own.

    Of all others, return it as it is.
    """
    global parent
    process = config.spawned()
    inter = world.MPI.Comm.Get_parent()
    if process is None or inter == world.MPI.COMM_NULL:
        return world
    try:
        comm = inter.Merge(high=True)
        told = comm.recv(None, 0, TAG)
    except Exception:  # of MPI: it has died
        leave()
    signal.setitimer(signal.ITIMER_REAL, 0)
    parent = Parent(comm, process, told)
    abort.counts = False  # the run goes on without it
    abort.end_without_finalizing(world.comm)
    return dataclasses.replace(world, **{k: v for k, v in told.items() if k != "hosts"})


def on_node(MPI: Any, comm: Any, node: int | None = None) -> Any:
    """Return the communicator of the ranks that share this node's memory. Collective.

    With `node`, its number, that is known already.
    """
    if node is not None:
        return comm.Split(node, comm.rank)
    if not config.replace():
        return comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    # Open MPI does not find out whether a rank that was spawned later shares it
    place = MPI.Get_processor_name(), Path("/dev/shm").stat().st_dev
    return comm.Split(comm.allgather(place).index(place), comm.rank)
