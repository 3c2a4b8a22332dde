"""Recording from `mpidl.init()` to the end of a script, on all ranks.

Nothing here ends a training: what goes wrong is told once on standard error, and the parts of the
trace stay where they are.
"""

from __future__ import annotations

import atexit
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpidl import abort, clock, config, spawned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpidl.trace.recorder import Recorder
    from mpidl.world import World

CHUNK_BYTES = 1 << 20  # of a part, in one message
LENGTH, CHUNK = 1, 2  # tags
#: Events of a rank, and of all: some 400 MB and 30 s at the end, and more no viewer opens.
LEAST, MOST, MOST_IN_ALL = 10_000, 1_000_000, 4_000_000

_session: _Session | None = None


def start(world: World) -> None:
    """Record from here on, where rank 0's MPIDL_TRACE names a file. Collective, at `init`."""
    global _session
    told = None
    if world.comm.rank == 0 and (path := config.trace()) is not None:
        run = config.trace_run() or config.run_id() or os.urandom(8).hex()
        events = config.trace_events() or max(LEAST, min(MOST, MOST_IN_ALL // world.size))
        told = path, run, os.urandom(8).hex(), events
    told = world.comm.bcast(told, 0)
    if told is not None and _session is None:
        _session = _Session(world, *told)
        config.note_trace(_session.run)
        abort.before(_failed)
        os.register_at_fork(after_in_child=_forget)


def moved(world: World) -> None:
    """Note that this process has another number from here on. Not collective."""
    if _session is not None:
        _session.size, _session.rank = world.size, world.rank
        if _session.recorder is not None:
            fact = {"moved": (time.perf_counter(), world.rank, world.size)}
            _session.recorder.tell(fact)


def leave(MPI: Any, comm: Any) -> None:
    """Complete the trace, all ranks having come to their end. Collective."""
    if _session is not None:
        try:
            _session.complete(MPI, comm)
        except Exception as error:  # of MPI, or of files
            from mpidl.trace.recorder import warn

            warn(f"not complete: {error}; mpidl trace merge {_session.path}")


class _Session:
    def __init__(self, world: World, path: Path, run: str, reference: str, limit: int) -> None:
        from mpidl.trace import clocks, parts, recorder

        self.path, self.run, self.size, self.rank = path, run, world.size, world.rank
        self.comm, self.machine = world.comm, clocks.machine()
        self.recorder: Recorder | None = None
        host = world.MPI.Get_processor_name()
        self.part = parts.place(path, run, world.rank, os.getpid(), host)
        sample = clocks.measure(world.MPI, world.comm, self.machine)
        process = {
            "rank": world.rank,
            "ranks": world.size,
            "host": host,
            "pid": os.getpid(),
            "run": run,
            "reference": reference,  # those with the same are compared with one clock
            "machine": self.machine,
            "attempt": config.attempt(),
            "joins": spawned.parent is not None,
            "unix": time.time(),
            "seconds": time.perf_counter(),
        }
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.recorder = recorder.Recorder(self.part, process, limit)
        except OSError as error:
            recorder.warn(f"rank {world.rank} on {host}: {error}; nothing is recorded there")
            return
        if sample is not None:
            self.recorder.tell({"clock": sample})
        self.recorder.start()

    def close(self, **facts: Any) -> None:
        """Write all that there is. Not collective."""
        found, self.recorder = self.recorder, None
        if found is not None:
            with clock.folded():  # so that what goes on now is told up to now
                pass
            found.close(**facts)

    def complete(self, MPI: Any, comm: Any) -> None:
        """Compare the clocks again, and merge the parts on rank 0. Collective."""
        from mpidl.trace import clocks

        clocks.wait(MPI, comm.Ibarrier())
        if comm == self.comm:  # the ranks are those that there were
            sample = clocks.measure(MPI, comm, self.machine)
            if sample is not None and self.recorder is not None:
                self.recorder.tell({"clock": sample})
        self.close(end=time.perf_counter())
        collect(MPI, comm, self.path, self.part)
        if comm.rank == 0:
            self.merge()

    def merge(self) -> None:
        """Merge the parts, if there are any."""
        from mpidl.trace import merge, recorder

        for note in merge.merge(self.path, self.run) or ():
            recorder.warn(note)


def collect(MPI: Any, comm: Any, path: Path, part: Path) -> None:
    """Bring parts that rank 0 does not see into the folder of `path`. Collective."""
    from mpidl.trace import clocks

    name, size = (part.name, part.stat().st_size) if part.exists() else ("", 0)
    there = comm.allgather((name, size))
    folder = path.parent
    seen = None
    if comm.rank == 0:
        seen = [not name or _is(folder / name, size) for name, size in there]
    seen = comm.bcast(seen, 0)
    assert seen is not None
    for rank, (name, size) in enumerate(there):
        chunks = [min(CHUNK_BYTES, size - at) for at in range(0, size, CHUNK_BYTES)]
        if seen[rank]:
            continue
        if comm.rank == 0:
            comm.send(_take(MPI, comm, rank, chunks, folder / name), rank, LENGTH)
        elif comm.rank == rank:
            with part.open("rb") as file:
                for count in chunks:
                    clocks.wait(MPI, comm.Isend(file.read(count), 0, CHUNK))
            if comm.recv(None, 0, LENGTH):
                part.unlink()


def _take(MPI: Any, comm: Any, rank: int, chunks: Sequence[int], place: Path) -> bool:
    """Write what `rank` sends, and return whether all of it is there; receives it anyway."""
    from mpidl.trace import clocks

    fresh = place.with_name(f"{place.name}.new")
    file = None
    with suppress(OSError):
        file = fresh.open("wb")
    written = 0
    for count in chunks:
        data = bytearray(count)
        clocks.wait(MPI, comm.Irecv(data, rank, CHUNK))
        if file is not None:
            with suppress(OSError):
                written += file.write(data)
    try:
        if file is None:
            return False
        file.close()
        if written == sum(chunks):
            fresh.replace(place)
            return True
    except OSError:
        pass
    fresh.unlink(missing_ok=True)
    return False


def _is(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def _failed() -> None:
    """Before this rank ends all others by an error."""
    if _session is not None:
        _session.close(failed=time.perf_counter())
        if _session.size == 1:
            _session.merge()


def _forget() -> None:
    global _session
    if _session is not None and _session.recorder is not None:
        _session.recorder.forget()
    _session = None


def _end() -> None:
    """At the end of this process: of one rank alone, or where `leave` has not come about."""
    if _session is None or _session.recorder is None:
        return
    status = abort.final_status()
    with suppress(Exception):
        _session.close(**({"failed": True} if status is None else {"end": time.perf_counter()}))
        if _session.size == 1 and not spawned.parent:
            _session.merge()


# At this module's import, which `watchdog` needs: after its own end, where `leave` is called.
atexit.register(_end)
