"""A record of the operations, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument
from mpidl.refuse import told
from mpidl.torch import session as sessions

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TextIO

    from mpidl.collectives import Handle, Request
    from mpidl.torch.session import Session

TENSORS, WAITS = 0, 1  # processes, in the format's terms
PACK, UNPACK = "MEMCPY_IN_FUSION_BUFFER", "MEMCPY_OUT_FUSION_BUFFER"  # Horovod's names


def start_timeline(
    file_path: str | os.PathLike[str],
    mark_cycles: bool = False,  # noqa: ARG001
) -> None:
    """Record rank 0's operations in a file of Chrome's trace event format. Not collective.

    Each tensor has a row, with names as in Horovod: NEGOTIATE_ALLREDUCE, say, from when it was
    submitted until all ranks had submitted it; then ALLREDUCE, while it was executed, and in that
    the copies to and from a buffer, if it went with others, and MPI's part. Below, each thread has
    a row of what it waited for. On other ranks nothing is recorded, as in Horovod. `mark_cycles`
    is there for Horovod's sake: there are no cycles. Raises InvalidArgument before `init`, and
    where a timeline is being recorded, and on rank 0 for a file that cannot be written.
    """
    session = sessions.active()
    if session.timeline is not None:
        raise InvalidArgument("start_timeline: one is being recorded; call stop_timeline() first")
    if session.world.rank == 0:
        try:
            session.timeline = Timeline(Path(file_path), session)
        except (OSError, TypeError, ValueError) as error:
            raise InvalidArgument(f"start_timeline({told(file_path)}): {error}") from error


def stop_timeline() -> None:
    """End the recording, and complete the file. Not collective; nothing if there is none."""
    session = sessions.active()
    if session.timeline is not None:
        session.timeline.close()


class Timeline:
    """Stands between the operations and the engine, and notes when they meet.

    The engine's thread tells of what was executed, others of what they submit and wait for.
    """

    def __init__(self, path: Path, session: Session) -> None:
        self._file: TextIO = path.open("w")
        self._file.write("[\n")
        self._separator = ""
        self._lock = threading.Lock()
        self._rows: dict[tuple[int, str], int] = {}  # by process and name
        self._ends: dict[int, float] = {}  # of the last operation, by row
        self._start = time.perf_counter()
        self._submitted: dict[int, tuple[float, Request]] = {}  # by id of the request
        for process, name in ((TENSORS, ""), (WAITS, " waits")):
            told = {"name": f"rank {session.world.rank}{name}"}
            self._write("process_name", "M", process, 0, args=told)
        self.follow(session)

    def follow(self, session: Session) -> None:
        """Record what goes through this session."""
        self._session, self._engine = session, session.engine
        session.timeline = self
        session.submit, session.submit_all = self._submit, self._submit_all
        session.wait = self._wait
        self._engine.observe(self._executed)

    def close(self) -> None:
        """Let the session go on without, and complete the file."""
        session, engine = self._session, self._engine
        session.timeline = None
        engine.observe(None)
        session.submit, session.submit_all = engine.submit, engine.submit_all
        session.wait = engine.wait
        with self._lock:
            for begin, request in self._submitted.values():
                self._negotiated(request, begin, self._now())
            self._file.write("\n]\n")
            self._file.close()

    def _submit(self, request: Request) -> Handle:
        return self._submit_all([request])[0]

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        now = self._now()
        for request in requests:
            self._submitted[id(request)] = now, request
        try:
            return self._engine.submit_all(requests)
        except BaseException:
            for request in requests:
                self._submitted.pop(id(request), None)
            raise

    def _wait(self, handle: Handle) -> Any:
        begin = self._now()
        try:
            return self._engine.wait(handle)
        finally:
            with self._lock:
                if not self._file.closed:
                    self._waited(handle, begin, self._now())

    def _waited(self, handle: Handle, begin: float, end: float) -> None:
        request, error = handle.request, handle.error
        if error is not None:
            submitted, _ = self._submitted.pop(id(request), (begin, request))
            self._negotiated(request, submitted, end, error=str(error))
        row = self._row(WAITS, threading.current_thread().name)
        self._write(request.name, "X", WAITS, row, begin, end)

    def _executed(self, handles: Sequence[Handle], seconds: Sequence[float]) -> None:
        """Note what the engine has executed as one; see `Engine.observe`."""
        times = [(second - self._start) * 1e6 for second in seconds]
        with self._lock:
            if self._file.closed:
                return
            for request in [handle.request for handle in handles]:
                submitted, _ = self._submitted.pop(id(request), (None, None))
                if submitted is None:  # others did it, while this rank waited in `join`
                    continue
                kind = request.kind.upper()
                row = self._negotiated(request, submitted, times[0])
                self._write(kind, "X", TENSORS, row, times[0], times[-1], _told(request))
                names = [f"MPI_{kind}"] if len(times) == 2 else [PACK, f"MPI_{kind}", UNPACK]
                for name, (begin, end) in zip(names, itertools.pairwise(times), strict=True):
                    self._write(name, "X", TENSORS, row, begin, end)
                self._ends[row] = times[-1]

    def _negotiated(self, request: Request, begin: float, end: float, **more: str) -> int:
        """Note how long the other ranks were waited for, and return the tensor's row."""
        row = self._row(TENSORS, request.name)
        begin = max(begin, self._ends.get(row, 0.0))  # the last of that name may have run on
        told = _told(request) | more
        self._write(f"NEGOTIATE_{request.kind.upper()}", "X", TENSORS, row, begin, end, told)
        return row

    def _row(self, process: int, name: str) -> int:
        key = process, name
        if key not in self._rows:
            row = self._rows[key] = len(self._rows) + 1
            self._write("thread_name", "M", process, row, args={"name": name})
        return self._rows[key]

    def _now(self) -> float:
        """Return microseconds since the start."""
        return (time.perf_counter() - self._start) * 1e6

    def _write(
        self,
        name: str,
        phase: str,
        process: int,
        row: int,
        begin: float | None = None,
        end: float | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        event: dict[str, Any] = {"name": name, "ph": phase, "pid": process, "tid": row}
        if begin is not None and end is not None:
            event |= {"ts": begin, "dur": max(0.0, end - begin)}
        if args is not None:
            event["args"] = args
        self._file.write(self._separator + json.dumps(event))
        self._separator = ",\n"


def _told(request: Request) -> dict[str, Any]:
    """Return what to tell of an operation."""
    told = {"dtype": request.dtype, "op": request.op, "process set": request.process_set}
    if request.array is not None:
        told["shape"] = list(request.array.shape)
    return told
