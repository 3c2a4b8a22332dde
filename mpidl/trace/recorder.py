"""What one process records, and the thread that writes it."""

from __future__ import annotations

import json
import os
import sys
import threading
from array import array
from collections import deque
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

from mpidl import clock
from mpidl.trace import ranges
from mpidl.trace.parts import EVENT_BYTES, MAGIC, PHASE, SECONDS, SPAN, SPLIT, STEP, TRACK, VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

WRITE_SECONDS = 1.0  # from one writing to the next: a killed rank loses no more
AT_ONCE = 256  # events: Python's lock is held for some 30 us, which training waits for
HELD = 1 << 17  # events at most that wait to be written, some 25 MB
NAMES, TRACKS = 10_000, 256  # at most
NAME_LENGTH = 200
OTHERS = "(other names)"


@final
class Recorder:
    """Keeps what the clock and ranges tell, and lets a thread write it to `path`.

    What is recorded costs a tuple and an append, which needs no lock. Memory is bounded: there are
    at most HELD events, of which the oldest are dropped, and the file ends with `limit` of them.
    What cannot be written is told once, on standard error, and nothing more is recorded.
    """

    def __init__(self, path: Path, process: Mapping[str, Any], limit: int) -> None:
        self.path, self.limit = path, limit
        self._events: deque[tuple[float, float, float, float, float]] = deque(maxlen=HELD)
        self._append = self._events.append
        self._names: dict[str, int] = {}
        self._tracks: dict[tuple[str, int], int] = {}
        self._news: list[dict[str, Any]] = []
        self._known = threading.Lock()  # of names and tracks
        self._writing = threading.Lock()
        self._written = 0
        self._moved = clock.moved_bytes
        self._file: int | None = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND,
                                         0o666)  # fmt: skip
        self._stopping = threading.Event()
        self._writer = threading.Thread(target=self._run, name="mpidl trace", daemon=True)
        self.tell({MAGIC: VERSION, **process})
        self._thread = _Thread(self)

    def start(self) -> None:
        """Record from now on."""
        self.resume()
        self.flush()
        self._writer.start()

    def resume(self) -> None:
        """Record again, after `rest`."""
        clock.listener, ranges.recorder = self, self

    @property
    def taken(self) -> int:
        """How many events there were so far."""
        return self._written + len(self._events)

    def rest(self) -> None:
        """Record no more; what was recorded is still to be written."""
        if clock.listener is self:
            clock.listener = None
        if ranges.recorder is self:
            ranges.recorder = None

    def interval(self, phase: int, begin: float, end: float) -> None:
        """Note that this phase lasted so long: see `clock.Listener`."""
        self._append((PHASE, phase, begin, end, 0.0))

    def split(self, begin: float, end: float, seconds: Sequence[float]) -> None:
        """Note phases that took turns."""
        if end > begin:
            compute, data, wait, reduce, update, other = seconds
            self._append((SPLIT, wait, begin, end, reduce))
            self._append((SECONDS, compute, data, update, other))

    def step(self, number: int, end: float) -> None:
        """Note that an update has been made."""
        self._append((STEP, number, end, clock.moved_bytes - self._moved, 0.0))

    def enter(self, name: str) -> None:
        """Note that a range begins in this thread."""
        self._thread.stack.append((name, perf_counter()))

    def leave(self, name: str) -> None:
        """Note that the innermost one of this name ends; one that began before this is left out."""
        end, thread = perf_counter(), self._thread
        stack = thread.stack
        at = len(stack) - 1
        while at >= 0 and stack[at][0] != name:
            at -= 1
        if at >= 0:
            number = self._names.get(name)
            if number is None:
                number = self._number(name)
            self._append((SPAN, thread.base + number, stack.pop(at)[1], end, 0.0))

    def span(self, name: str, begin: float, end: float, nbytes: float = 0.0) -> None:
        """Note what this thread has done."""
        number = self._names.get(name)
        if number is None:
            number = self._number(name)
        self._append((SPAN, self._thread.base + number, begin, end, nbytes))

    def _number(self, name: str) -> int:
        """Return the number of a name, which is told to those who read the file."""
        with self._known:
            if name not in self._names:
                if len(self._names) >= NAMES:
                    name = OTHERS
                text = name[:NAME_LENGTH].encode(errors="replace").decode()
                if name not in self._names:
                    self._names[name] = len(self._names)
                    self._news.append({"names": [text]})
            return self._names[name]

    def track(self) -> int:
        """Return the number of this thread's track: those of mpidl itself share one by name."""
        thread = threading.current_thread()
        ours = thread.name.startswith("mpidl ")
        key = thread.name, 0 if ours else thread.ident or 0
        with self._known:
            if key not in self._tracks and len(self._tracks) >= TRACKS:
                key = "other threads", 0
            if key not in self._tracks:
                main = thread is threading.main_thread()
                text = "main thread" if main else key[0].encode(errors="replace").decode()
                self._tracks[key] = len(self._tracks)
                self._news.append({"tracks": [text[:NAME_LENGTH]]})
            return self._tracks[key]

    def tell(self, fact: dict[str, Any]) -> None:
        """Write a line, with the next events."""
        with self._known:
            self._news.append(fact)

    def _run(self) -> None:
        while not self._stopping.wait(WRITE_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Write what there is. In any thread."""
        with self._writing:
            if len(self._events) == HELD:
                self.tell({"dropped": True})
            while self._file is not None and (self._events or self._news):
                count = min(AT_ONCE, len(self._events))
                batch = [self._events.popleft() for _ in range(count)]
                room = self.limit - self._written
                if len(batch) > room:
                    self.rest()
                    self.tell({"full": perf_counter()})
                    del batch[room:]
                    self._events.clear()
                self._written += len(batch)
                with self._known:  # after the events, whose names it has
                    news, self._news = self._news, []
                lines = [json.dumps(fact) for fact in news]
                if batch:
                    lines.append(json.dumps({"events": len(batch)}))
                text = "".join(line + "\n" for line in lines).encode()
                self._write(text + array("d", chain.from_iterable(batch)).tobytes())

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while self._file is not None and left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self.rest()
            self._events.clear()
            self._close()
            warn(f"{self.path}: {error.strerror or error}; no more is recorded")

    def close(self, **facts: Any) -> None:
        """Record no more, and write all, with what is told of the end."""
        self.rest()
        self._stopping.set()
        if self._writer.is_alive() and threading.current_thread() is not self._writer:
            self._writer.join()
        self.flush()
        if facts:  # after all events
            self.tell(facts)
            self.flush()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def forget(self) -> None:
        """In a forked child: it is no rank."""
        self.rest()
        self._events.clear()
        self._close()


class _Thread(threading.local):
    """The ranges that a thread is in."""

    def __init__(self, recorder: Recorder) -> None:
        self.stack: list[tuple[str, float]] = []
        self.base = recorder.track() * TRACK


def warn(text: str) -> None:
    """Tell of what goes wrong with a trace: nothing else does for that."""
    try:
        print(f"mpidl: trace: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


assert array("d").itemsize * 5 == EVENT_BYTES
