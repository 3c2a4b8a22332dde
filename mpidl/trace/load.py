"""Reads a trace that was merged, for what looks into it."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from mpidl.clock import OTHER, PHASES
from mpidl.errors import InvalidArgument
from mpidl.trace import parts
from mpidl.trace.analysis import Process
from mpidl.trace.merge import FIRST, FORMAT
from mpidl.trace.tracks import Interval, Span, Step

if TYPE_CHECKING:
    from pathlib import Path

MAIN = "main thread"


def load(path: Path) -> tuple[dict[int, Process], list[str]]:
    """Return the processes of a trace, by their numbers in it, and its notes.

    Raises InvalidArgument for what is no trace of mpidl.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            found = json.load(file)
        about, events = found["otherData"], found["traceEvents"]
        if about[FORMAT] != parts.VERSION or not isinstance(events, list):
            raise ValueError
        processes = _processes(events)
    except FileNotFoundError:
        merge = f": mpidl trace merge {path}" if parts.of(path) else ""
        raise InvalidArgument(f"{path}: no such file{merge}") from None
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror or error}") from error
    except (ArithmeticError, EOFError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: no trace of mpidl") from error
    return processes, [str(note) for note in about.get("notes", ())]


def _processes(events: list[dict[str, Any]]) -> dict[int, Process]:
    made: dict[int, Process] = {}
    threads: dict[tuple[int, int], str] = {}
    ranges: list[tuple[int, Span]] = []
    for event in events:
        pid = int(event["pid"])
        process = made.get(pid)
        if process is None:
            process = made[pid] = Process(f"process {pid}")
        if event["ph"] == "M":
            name = str(event["args"].get("name"))
            if event["name"] == "process_name":
                process.name = name
            elif event["name"] == "thread_name":
                threads[pid, int(event["tid"])] = name
        if event["ph"] != "X":
            continue
        begin = float(event["ts"]) / 1e6
        end = begin + float(event["dur"]) / 1e6
        args = event.get("args", {})
        if event["cat"] == "step":
            process.steps.append(Step(int(args["step"]), begin, end, float(args["bytes"])))
        elif event["cat"] == "range":
            ranges.append((pid, Span(int(event["tid"]), str(event["name"]), begin, end, 0.0)))
        elif event["cat"] == "phase" and end > begin:
            process.phases.append(_interval(str(event["name"]), begin, end, args))
    for pid, span in ranges:
        if threads.get((pid, span.track)) == MAIN:
            made[pid].spans.append(span)
    for process in made.values():
        process.phases.sort()
        process.steps.sort(key=lambda step: step.end)
        process.spans.sort(key=lambda span: (span.begin, -span.end))
    return dict(sorted(made.items()))


def _interval(name: str, begin: float, end: float, args: dict[str, Any]) -> Interval:
    if any(phase in args for phase in PHASES):
        return Interval(begin, end, -1, tuple(float(args.get(phase, 0.0)) for phase in PHASES))
    return Interval(begin, end, PHASES.index(name) if name in PHASES else OTHER)


assert FIRST == 2
