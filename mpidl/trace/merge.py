"""Merges the parts of a trace into one file, by one clock."""

from __future__ import annotations

import gzip
import itertools
import json
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from mpidl.clock import OTHER, PHASES
from mpidl.errors import InvalidArgument
from mpidl.marks import some
from mpidl.trace import clocks, parts, tracks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from mpidl.trace.parts import Part
    from mpidl.trace.tracks import Shift, Tracks

STEPS, PHASES_TRACK, FIRST = 0, 1, 2  # numbers of tracks
FORMAT = "mpidl trace"


def merge(path: Path, run: str | None = None, *, remove: bool = True) -> list[str]:
    """Write the trace `path` of its parts, and remove them. Returns what is worth a note.

    Without `run` those of the latest one. Raises InvalidArgument where there are none, or the trace
    is newer than they are, and OSError.
    """
    runs = parts.of(path, run)
    if not runs:
        raise InvalidArgument(f"{path}: no parts of a trace there ({path.name}.*{parts.SUFFIX})")
    name, files = list(runs.items())[-1]
    newest = max(file.stat().st_mtime for file in files)
    if run is None and path.exists() and path.stat().st_mtime > newest:
        raise InvalidArgument(f"{path} is newer than its parts, of another run: move it first")
    found = [parts.read(file, events=False) for file in files]
    heads = [part for part in found if part is not None]
    notes = [f"{file}: empty" for file, part in zip(files, found, strict=True) if part is None]
    if not heads:
        raise InvalidArgument(f"{path}: its parts are empty")
    heads.sort(key=lambda part: (part.process["unix"], part.rank))
    shifts = align(heads)
    zero = min(float(shift(np.array([p.begin]))[0]) for p, shift in zip(heads, shifts, strict=True))
    notes += told_of(heads)
    fresh = path.with_name(f"{path.name}.{name}.new")
    about = {
        FORMAT: parts.VERSION,
        "ranks": heads[0].process["ranks"],
        "run": name,
        "began": heads[0].process["unix"],
        "notes": notes,
        # how far the clock of each was ahead of rank 0's: when, seconds, their uncertainty
        "clocks": [[part.rank, part.samples] for part in heads if part.samples],
    }
    try:
        with _opened(fresh, zipped=path.suffix == ".gz") as out:
            out.write(f'{{"otherData": {json.dumps(about)},\n"displayTimeUnit": "ms",\n')
            out.write('"traceEvents": [\n')
            taken: set[int] = set()
            order = np.argsort([part.rank for part in heads], kind="stable").tolist()
            for i in order:
                pid = heads[i].rank
                while pid in taken:
                    pid += heads[0].process["ranks"]
                taken.add(pid)
                part = parts.read(heads[i].path) or heads[i]
                comma = "" if len(taken) == len(heads) else ","
                writer = _Writer(out, part, pid, again=pid != part.rank)
                writer.write(tracks.of_part(part, partial(_since, shifts[i], zero)))
                out.write(f"{writer.last}{comma}\n")
            out.write("]}\n")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    for old in files if remove else ():
        with suppress(OSError):
            old.unlink()
    return notes


def _opened(path: Path, *, zipped: bool) -> TextIO:
    if zipped:
        return gzip.open(path, "wt", compresslevel=6, encoding="utf-8")
    return path.open("w", encoding="utf-8")


def _since(shift: Shift, zero: float, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return shift(times) - zero


def align(heads: Sequence[Part]) -> list[Shift]:
    """Return, for each part, what makes of its times those of the first one's rank 0.

    By what was measured; else its machine's clock is that of another one's; else by the time of day
    at which they were started, which is as exact as the hosts' clocks are.
    """
    reference = heads[0].process["reference"]
    first = [part for part in heads if part.process["reference"] == reference]
    samples = {part.process["machine"]: part.samples for part in first if part.samples}
    root = min(first, key=lambda part: part.rank)
    samples.setdefault(root.process["machine"], [])
    day = root.process["unix"] - root.process["seconds"]
    shifts: list[Shift] = []
    for part in heads:
        found = samples.get(part.process["machine"])
        if found is None:
            by = part.process["seconds"] - part.process["unix"] + day
            found = [(part.begin, by, 1.0)]
        shifts.append(partial(_shift, found))
    return shifts


def _shift(
    samples: Sequence[clocks.Sample], times: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return times - clocks.ahead(samples, times)


def told_of(heads: Sequence[Part]) -> list[str]:
    """Return what is missing."""
    notes = []
    wanted = range(max(part.process["ranks"] for part in heads))
    missing = set(wanted) - {part.rank for part in heads}
    if missing:
        notes.append(f"no part of {some(missing)}")
    for what, which in (
        ("without an end", [p.rank for p in heads if p.end is None and not p.failed]),
        ("ended by an error", [p.rank for p in heads if p.failed]),
        ("not to the end, MPIDL_TRACE_EVENTS", [p.rank for p in heads if p.full is not None]),
        ("with events left out, of too many", [p.rank for p in heads if p.dropped]),
    ):
        if which:
            notes.append(f"{some(which)}: {what}")
    return notes


class _Writer:
    """Writes the events of one process."""

    def __init__(self, file: TextIO, part: Part, pid: int, *, again: bool) -> None:
        self._file, self._part, self._pid = file, part, pid
        self._again = again  # whether another process has this rank's number for its own
        self.last = ""

    def write(self, found: Tracks) -> None:
        """Write all but the `last` line, which may need a comma."""
        part, process = self._part, self._part.process
        name = f"rank {part.rank} on {process['host']}"
        if self._again:
            after = f"attempt {process['attempt']}" if process["attempt"] else "later"
            name += f", {after}"
        state = "ended by an error" if part.failed else "no end" if part.end is None else ""
        self._meta("process_name", {"name": name})
        self._meta("process_sort_index", {"sort_index": self._pid})
        if state:
            self._meta("process_labels", {"labels": state})
        self._track(STEPS, "steps")
        self._track(PHASES_TRACK, "phases")
        self._steps(found)
        self._phases(found)
        self._spans(found)
        for at, rank, size in found.moves:
            name = f"rank {rank} of {size} from here on"
            self._file.write(self._event("i", name, STEPS, round(at * 1e9), '"s":"p"') + ",\n")
        self._line("i", "end" if part.end is not None else "last event", STEPS, self._until(found),
                   '"s":"p"')  # fmt: skip

    def _until(self, found: Tracks) -> float:
        ends = (interval.end for interval in found.phases[-1:])
        return max(0.0, *ends, *(step.end for step in found.steps[-1:]), 0.0)

    def _steps(self, found: Tracks) -> None:
        word = "step" if found.marked else "average"
        for step in found.steps:
            args = f'"args":{{"step":{step.number},"bytes":{step.nbytes:.0f}}}'
            self._span(f"{word} {step.number}", STEPS, "step", step.begin, step.end, args)

    def _phases(self, found: Tracks) -> None:
        steps = iter([*found.steps, None])
        step = next(steps)
        for interval in found.phases:
            begin, end = max(interval.begin, 0.0), interval.end
            if end < begin:
                continue
            middle = (begin + end) / 2
            while step is not None and step.end < middle:
                step = next(steps)
            inside = step is not None and step.begin <= middle
            args = [f'"step":{step.number}'] if step is not None and inside else []
            if interval.phase >= 0:
                name = PHASES[interval.phase]
            else:
                spent = zip(PHASES, interval.seconds, strict=True)
                seconds = [(name, s) for name, s in spent if s > 0]
                args += [f'"{name}":{s:.9f}' for name, s in seconds]
                name = ", ".join(name for name, _ in seconds) or PHASES[OTHER]
            told = f'"args":{{{",".join(args)}}}'
            self._span(name, PHASES_TRACK, "phase", begin, end, told)

    def _spans(self, found: Tracks) -> None:
        next_tid = FIRST
        by_track = sorted(found.spans, key=lambda span: span.track)  # stable: by time within each
        for track, spans in itertools.groupby(by_track, key=lambda span: span.track):
            names = self._part.tracks
            name = names[track] if track < len(names) else "a thread"
            placed = tracks.lanes(spans)
            for lane in range(1 + max(lane for lane, _ in placed)):
                self._track(next_tid + lane, f"{name}{f', {lane + 1}' * (lane > 0)}")
            for lane, span in placed:
                args = f'"args":{{"bytes":{span.nbytes:.0f}}}' if span.nbytes else '"args":{}'
                begin = max(span.begin, 0.0)
                self._span(span.name, next_tid + lane, "range", begin, max(begin, span.end), args)
            next_tid += 1 + max(lane for lane, _ in placed)

    def _track(self, tid: int, name: str) -> None:
        self._meta("thread_name", {"name": name}, tid)
        self._meta("thread_sort_index", {"sort_index": tid}, tid)

    def _meta(self, kind: str, args: dict[str, Any], tid: int = 0) -> None:
        event = {"ph": "M", "name": kind, "pid": self._pid, "tid": tid, "args": args}
        self._file.write(json.dumps(event) + ",\n")

    def _span(self, name: str, tid: int, kind: str, begin: float, end: float, more: str) -> None:
        first, last = round(begin * 1e9), round(end * 1e9)
        more = f'"cat":"{kind}","dur":{_microseconds(last - first)},{more}'
        self._file.write(self._event("X", name, tid, first, more) + ",\n")

    def _line(self, kind: str, name: str, tid: int, at: float, more: str) -> None:
        self.last = self._event(kind, name, tid, round(at * 1e9), more)

    def _event(self, kind: str, name: str, tid: int, at: int, more: str) -> str:
        return (
            f'{{"ph":"{kind}","name":{json.dumps(name)},"pid":{self._pid},"tid":{tid},'
            f'"ts":{_microseconds(at)},{more}}}'
        )


def _microseconds(nanoseconds: int) -> str:
    """Return them with all digits: what ends where another begins does so in the file, too."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03}"
