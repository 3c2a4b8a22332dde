"""The part of a trace that one process writes: lines of JSON, with events between them.

The first line tells of the process. A line {"events": n} is followed by n events of EVENT_BYTES,
five float64 each: what it is, and four numbers. Others tell names, times and clocks. What a killed
process had not written to its end is left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from mpidl.trace.clocks import Sample

VERSION = 1
MAGIC = "mpidl trace part"
EVENT_BYTES = 40
SUFFIX = ".part"
#: Kinds of events, and their numbers:
#:   PHASE    phase, begin, end, -
#:   SPLIT    seconds of "wait", begin, end, seconds of "reduce": phases that took turns
#:   SECONDS  of "compute", "data", "update", "other", in the last SPLIT
#:   STEP     number, end, bytes moved so far, -
#:   SPAN     track x TRACK + name, begin, end, bytes
PHASE, SPLIT, SECONDS, STEP, SPAN = map(float, range(5))
TRACK = 1 << 16


@dataclass
class Part:
    """What is in one."""

    path: Path
    process: dict[str, Any]  #: the first line
    names: list[str] = field(default_factory=list)
    tracks: list[str] = field(default_factory=list)  #: of threads
    samples: list[Sample] = field(default_factory=list)  #: how far its clock is ahead
    moves: list[tuple[float, int, int]] = field(default_factory=list)  #: when, new rank, of many
    end: float | None = None  #: None for a process that came to none
    failed: bool = False
    full: float | None = None  #: since when there was no more room
    dropped: bool = False  #: whether events came faster than they were written
    events: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 5)))

    @property
    def rank(self) -> int:
        """Its number at the start."""
        return int(self.process["rank"])

    @property
    def begin(self) -> float:
        """When it was started, by its own clock."""
        return float(self.process["seconds"])


def place(path: Path, run: str, rank: int, pid: int, host: str) -> Path:
    """Return where a process writes its part of the trace `path`."""
    host = re.sub(r"[^\w.-]", "_", host, flags=re.ASCII)[:64]
    return path.with_name(f"{path.name}.{run}.{rank}-{pid}-{host}{SUFFIX}")


def of(path: Path, run: str | None = None) -> dict[str, list[Path]]:
    """Return the parts of the trace `path`, by run, the latest run last. Raises OSError."""
    pattern = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8,64})\.\d+-\d+-.*" + SUFFIX)
    found: dict[str, list[Path]] = {}
    folder = path.parent
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(file.name)
        if match is not None and run in (None, match[1]):
            found.setdefault(match[1], []).append(file)
    latest = {name: max(file.stat().st_mtime for file in files) for name, files in found.items()}
    return {name: found[name] for name in sorted(found, key=latest.__getitem__)}


def read(path: Path, *, events: bool = True) -> Part | None:
    """Return what a part tells, None where nothing was written yet. Raises OSError."""
    part: Part | None = None
    blocks = []
    with path.open("rb") as file:
        while line := file.readline(1 << 20):
            try:
                told = json.loads(line)
            except ValueError:  # cut off
                told = None
            if not isinstance(told, dict):
                break
            if part is None:
                if told.get(MAGIC) != VERSION:
                    break
                part = Part(path, told)
            size = told.get("events", 0) * EVENT_BYTES
            if size and not events:
                file.seek(size, 1)
            elif size:
                block = file.read(size)
                whole = len(block) // EVENT_BYTES * EVENT_BYTES
                blocks.append(np.frombuffer(block[:whole], np.float64).reshape(-1, 5))
            _take(part, told)
    if part is not None and blocks:
        part.events = np.concatenate(blocks)
    return part


def _take(part: Part, told: dict[str, Any]) -> None:
    part.names += told.get("names", ())
    part.tracks += told.get("tracks", ())
    if "clock" in told:
        part.samples.append(tuple(told["clock"]))
    if "moved" in told:
        part.moves.append(tuple(told["moved"]))
    part.end = told.get("end", part.end)
    part.failed |= "failed" in told
    part.full = told.get("full", part.full)
    part.dropped |= "dropped" in told
