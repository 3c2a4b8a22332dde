"""`Run`: a run folder, read as far as it can be read, whole or while it grows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.clock import PHASES
from mpidl.errors import InvalidArgument
from mpidl.report.values import Lines, mapping, number, numbers, printable, read, time, whole

OWN = ("compute", "data", "update")  # a rank's own work of a step: what makes others wait
FILES = ("config.json", "metrics.jsonl", "state.json")


@dataclass(frozen=True)
class Steps:
    """Some steps, from a line of kind "steps"."""

    step: int  #: updates made when it was written
    count: int  #: since the line before
    time: float  #: Unix time
    loss: float  #: mean over rank 0's samples of these steps
    samples_per_second: float
    seconds: dict[str, float]  #: by phase, of rank 0, mean of a step; empty where not measured


@dataclass(frozen=True)
class Epoch:
    """An epoch: the fields of `mpidl.Epoch`, and what was measured of each rank."""

    epoch: int
    steps: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    samples_per_second: float
    time: float = math.nan
    phases: dict[str, list[float]] = field(default_factory=dict)  #: seconds, by rank
    moved_bytes: list[float] = field(default_factory=list)  #: by rank
    peak_memory_bytes: list[float] = field(default_factory=list)  #: by rank
    noise: dict[str, float] = field(default_factory=dict)  #: "scale", "batch", ...


@dataclass(frozen=True)
class Times:
    """Seconds a step in an epoch, by rank and column of some steps."""

    epoch: int
    first_step: int
    steps_per_column: int
    seconds: dict[str, np.ndarray]  #: by phase: (ranks, columns) float64, NaN where unknown


class Run:
    """What a run folder says. `look` reads what has been written since.

    A run that went on in its folder has several metrics.jsonl: a later one counts where it tells
    of the same steps again.

    Raises:
        InvalidArgument: `path` is no run folder.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        if not any((self.path / name).is_file() for name in FILES):
            raise InvalidArgument(
                f"{printable(str(path))}: no run folder: expected one that Trainer(out=...) "
                "writes, with config.json and metrics.jsonl"
            )
        self.name = printable(name or self.path.absolute().resolve().name)
        self._begin()
        self.look()

    def _begin(self) -> None:
        self._earlier: tuple[list[Steps], list[Epoch]] = [], []
        self.times: list[Times] = []
        self._now = {}
        for name, take in (("metrics.jsonl", self._metrics), ("times.jsonl", self._times)):
            earlier = [p for p in self.path.glob(f"{name}.*") if p.suffix[1:].isdecimal()]
            earlier.sort(key=lambda p: int(p.suffix[1:]))
            self._now[name] = [Lines(path) for path in (*earlier, self.path / name)]
            for lines in self._now[name][:-1]:
                self._file: tuple[list[Steps], list[Epoch]] = [], []
                take(lines.new())
                if name == "metrics.jsonl":
                    self._earlier = _after(self._earlier, self._file)
        self._file = [], []

    def look(self) -> None:
        """Read what is new."""
        if any(files[-1].replaced and files[-1].path.exists() for files in self._now.values()):
            self._begin()
        self.config = read(self.path / "config.json")
        self.state = read(self.path / "state.json")
        self.summary = read(self.path / "summary.json")
        self._metrics(self._now["metrics.jsonl"][-1].new())
        self._times(self._now["times.jsonl"][-1].new())
        self.steps, self.epochs = _after(self._earlier, self._file)

    @property
    def damaged(self) -> dict[str, int]:
        """How many lines cannot be read, by file."""
        every = [lines for files in self._now.values() for lines in files]
        return {lines.path.name: lines.damaged for lines in every if lines.damaged}

    @property
    def ranks(self) -> int:
        """The number of ranks, 0 where nothing tells it."""
        lists = [len(e.phases.get("compute", ())) for e in self.epochs[-1:]]
        told = [whole(found.get("ranks")) for found in (self.summary, self.state, self.config)]
        return next((n for n in (*lists, *told) if n), 0)

    def phases(self) -> dict[str, np.ndarray]:
        """Return the seconds of each rank (ranks,) by phase, of all epochs; empty if unknown."""
        rows = [epoch.phases for epoch in self.epochs if epoch.phases]
        rows = rows or [_lists(self.summary.get("phases"))]
        ranks = max((len(v) for row in rows for v in row.values()), default=0)
        if not ranks:
            return {}
        found = {phase: np.zeros(ranks) for phase in PHASES}
        for row in rows:
            for phase, values in row.items():  # ranks that came or went have fewer epochs
                found[phase][: len(values)] += np.nan_to_num(values)
        return found

    def updates(self) -> float:
        """Return how many updates `phases` covers."""
        some = [epoch for epoch in self.epochs if epoch.phases]
        if not some:
            return number(self.summary.get("steps"))
        first = some[0]
        return some[-1].steps - first.steps + first.steps / max(1, first.epoch)

    def _metrics(self, records: list[dict[str, Any]]) -> None:
        steps, epochs = self._file
        for record in records:
            if record.get("kind") == "steps":
                if (one := _steps(record)) is not None:
                    while steps and steps[-1].step >= one.step:  # made again: ranks had died
                        steps.pop()
                    steps.append(one)
            elif (made := _epoch(record)) is not None:
                while epochs and epochs[-1].epoch >= made.epoch:
                    epochs.pop()
                epochs.append(made)

    def _times(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            made = _columns(record)
            if made is not None:
                self.times = [t for t in self.times if t.epoch < made.epoch]
                self.times.append(made)


def _after(
    earlier: tuple[list[Steps], list[Epoch]], later: tuple[list[Steps], list[Epoch]]
) -> tuple[list[Steps], list[Epoch]]:
    """Return what two files tell, where the later one began anew or went on from a checkpoint."""
    steps, epochs = later
    if not steps and not epochs:
        return earlier
    number = epochs[0].epoch if epochs else None
    begin = steps[0].step - steps[0].count if steps else None
    before = [e for e in earlier[1] if number is None or e.epoch < number]
    if begin is None:
        begin = before[-1].steps if before else 0
    before = [e for e in before if e.steps <= begin]
    return [*(s for s in earlier[0] if s.step <= begin), *steps], [*before, *epochs]


def _steps(record: dict[str, Any]) -> Steps | None:
    step, count = whole(record.get("step")), whole(record.get("count"))
    if step is None:
        return None
    seconds = {p: time(v) for p, v in mapping(record.get("seconds")).items() if p in PHASES}
    when, loss, rate = (number(record.get(n)) for n in ("time", "loss", "samples_per_second"))
    return Steps(step, max(1, count or 1), when, loss, rate, seconds)


def _epoch(record: dict[str, Any]) -> Epoch | None:
    epoch, steps = whole(record.get("epoch")), whole(record.get("steps"))
    if record.get("kind", "epoch") != "epoch" or epoch is None or steps is None:
        return None
    metrics = {printable(k): number(v) for k, v in mapping(record.get("metrics")).items()}
    return Epoch(
        epoch,
        steps,
        number(record.get("loss")),
        metrics,
        time(record.get("seconds")),
        number(record.get("samples_per_second")),
        number(record.get("time")),
        _lists(record.get("phases")),
        numbers(record.get("moved_bytes")),
        numbers(record.get("peak_memory_bytes")),
        {name: number(value) for name, value in mapping(record.get("noise")).items()},
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _lists(value: Any) -> dict[str, list[float]]:
    found = {p: [time(v) for v in _list(mapping(value).get(p))] for p in PHASES}
    return found if any(found.values()) else {}


def _columns(record: dict[str, Any]) -> Times | None:
    epoch, first = whole(record.get("epoch")), whole(record.get("first_step"))
    each = whole(record.get("steps_per_column"))
    given = mapping(record.get("seconds"))
    rows = {p: [[time(one) for one in _list(r)] for r in _list(v)] for p, v in given.items()
            if p in PHASES}  # fmt: skip
    ranks = max(map(len, rows.values()), default=0)
    columns = max((len(r) for v in rows.values() for r in v), default=0)
    if epoch is None or first is None or not each or not ranks or not columns:
        return None
    seconds = {}
    for phase, lists in rows.items():
        seconds[phase] = np.full((ranks, columns), np.nan)
        for i, row in enumerate(lists):
            seconds[phase][i, : len(row)] = row
    return Times(epoch, first, each, seconds)
