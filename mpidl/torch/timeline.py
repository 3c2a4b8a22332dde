"""A record of the operations, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument
from mpidl.torch import session as sessions

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import TextIO

    from mpidl.collectives import Handle, Request
    from mpidl.torch.session import Session


def start_timeline(
    file_path: str | os.PathLike[str],
    mark_cycles: bool = False,  # noqa: ARG001
) -> None:
    """Record rank 0's operations in a file of Chrome's trace event format. Not collective.

    Each tensor has a row: from when it was submitted until somebody knew that it was done, and
    in it the time that was spent waiting for it. On other ranks nothing is recorded, as in
    Horovod. `mark_cycles` is there for Horovod's sake: there are no cycles. Raises
    InvalidArgument before `init`, and where a timeline is being recorded.
    """
    session = sessions.active()
    if session.timeline is not None:
        raise InvalidArgument("start_timeline: one is being recorded; call stop_timeline() first")
    if session.world.rank == 0:
        session.timeline = Timeline(Path(file_path), session)


def stop_timeline() -> None:
    """End the recording, and complete the file. Not collective; nothing if there is none."""
    session = sessions.active()
    if session.timeline is not None:
        session.timeline.close()


class Timeline:
    """Stands between the operations and the engine, and notes when they meet."""

    def __init__(self, path: Path, session: Session) -> None:
        self._file: TextIO = path.open("w")
        self._file.write("[\n")
        self._separator = ""
        self._rows: dict[str, int] = {}
        self._start = time.perf_counter()
        self._submitted: dict[int, tuple[float, Any]] = {}  # by id of the handle
        self._write("process_name", "M", 0, args={"name": f"rank {session.world.rank}"})
        self.follow(session)

    def follow(self, session: Session) -> None:
        """Record what goes through this session."""
        self._session, self._engine = session, session.engine
        session.timeline = self
        session.submit, session.submit_all = self._submit, self._submit_all
        session.wait = self._wait

    def close(self) -> None:
        """Let the session go on without, and complete the file."""
        session, engine = self._session, self._engine
        session.timeline = None
        session.submit, session.submit_all = engine.submit, engine.submit_all
        session.wait = engine.wait
        for begin, handle in self._submitted.values():
            self._operation(handle, begin)
        self._file.write("\n]\n")
        self._file.close()

    def _submit(self, request: Request) -> Handle:
        return self._submit_all([request])[0]

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        now = self._now()
        handles = self._engine.submit_all(requests)
        for handle in handles:
            self._submitted[id(handle)] = now, handle
        return handles

    def _wait(self, handle: Handle) -> Any:
        begin = self._now()
        try:
            return self._engine.wait(handle)
        finally:
            submitted, _ = self._submitted.pop(id(handle), (begin, handle))
            self._operation(handle, submitted)
            self._write("WAIT", "X", self._row(handle.request.name), begin, self._now() - begin)

    def _operation(self, handle: Handle, begin: float) -> None:
        request = handle.request
        args = {"dtype": request.dtype, "op": request.op, "process set": request.process_set}
        if request.array is not None:
            args["shape"] = list(request.array.shape)
        if handle.error is not None:
            args["error"] = str(handle.error)
        row = self._row(request.name)
        self._write(request.kind.upper(), "X", row, begin, self._now() - begin, args)

    def _row(self, name: str) -> int:
        if name not in self._rows:
            row = self._rows[name] = len(self._rows) + 1
            self._write("thread_name", "M", row, args={"name": name})
        return self._rows[name]

    def _now(self) -> float:
        """Return microseconds since the start."""
        return (time.perf_counter() - self._start) * 1e6

    def _write(
        self,
        name: str,
        phase: str,
        row: int,
        begin: float | None = None,
        duration: float | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        event = {"name": name, "ph": phase, "pid": 0, "tid": row}
        times = {"ts": begin, "dur": duration, "args": args}
        event |= {key: value for key, value in times.items() if value is not None}
        self._file.write(self._separator + json.dumps(event))
        self._separator = ",\n"
