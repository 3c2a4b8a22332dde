"""Where the time of each rank goes: gathered once an epoch, and told at the end."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import clock

if TYPE_CHECKING:
    from mpidl.world import World

MOST_NUMBERS = 1 << 15  # of all ranks' columns of an epoch: so long is a line of times.jsonl
LEAST_COLUMNS, MOST_COLUMNS = 8, 64


class Columns:
    """The seconds of each phase, a step; means over as many steps as keeps them below `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.steps_per_column = most, 1
        self._sums: list[list[float]] = []
        self._open, self._steps = [0.0] * len(clock.PHASES), 0  # of the last one

    def append(self, row: list[float]) -> None:
        """Count a step that took `row`, in seconds by phase."""
        self._open = [a + b for a, b in zip(self._open, row, strict=True)]
        self._steps += 1
        if self._steps < self.steps_per_column:
            return
        self._sums.append(self._open)
        self._open, self._steps = [0.0] * len(row), 0
        if len(self._sums) == self.most:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
            self.steps_per_column *= 2

    def means(self) -> list[list[float]]:
        """Return the mean of each column, in order: seconds by phase."""
        counts = [self.steps_per_column] * len(self._sums) + [self._steps]
        sums = [*self._sums, self._open]
        return [[s / n for s in column] for column, n in zip(sums, counts, strict=True) if n]


@dataclass(frozen=True)
class Lapped:
    """Where the time of all ranks went in one epoch; lists are by rank."""

    seconds: list[float]  #: spent in training steps
    here: float  #: of these, in this run, on the slowest rank
    phases: dict[str, list[float]]  #: seconds in each, of `mpidl.clock.PHASES`
    moved_bytes: list[int]  #: received from others, or read in their memory
    peak_memory_bytes: list[int]  #: of the process, so far
    steps_per_column: int
    columns: dict[str, list[list[float]]]  #: [phase][rank]: seconds a step, in each column


class Lap:
    """Begins to watch one epoch on this rank; `columns`: also step by step."""

    def __init__(self, world: World, *, columns: bool) -> None:
        self._before, self._moved = clock.read(), clock.moved_bytes
        self._begun = time.perf_counter()
        self._columns: Columns | None = None
        if columns:
            wanted = MOST_NUMBERS // (world.size * len(clock.PHASES))
            self._columns = Columns(2 * max(LEAST_COLUMNS, min(wanted, MOST_COLUMNS)))
        clock.record(self._columns)

    def end(self, world: World, before: float) -> Lapped:
        """Return what all ranks found. Collective.

        `before` are the seconds that an earlier run had spent in this epoch.
        """
        here = time.perf_counter() - self._begun
        clock.record(None)
        phases = [a - b for a, b in zip(clock.read(), self._before, strict=True)]
        means = [] if self._columns is None else self._columns.means()
        per = 1 if self._columns is None else self._columns.steps_per_column
        moved = clock.moved_bytes - self._moved
        found = world.gather((here, phases, moved, peak_memory(), per, means))
        each, by_rank, moved_bytes, peaks, _, columns = zip(*found, strict=True)
        return Lapped(
            seconds=[spent + before for spent in each],
            here=max(each),
            phases={name: [p[i] for p in by_rank] for i, name in enumerate(clock.PHASES)},
            moved_bytes=list(moved_bytes),
            peak_memory_bytes=list(peaks),
            steps_per_column=per,
            columns={
                name: [[column[i] for column in rank] for rank in columns]
                for i, name in enumerate(clock.PHASES)
            },
        )


class Totals:
    """What the epochs of a run came to, on rank 0: of the ranks that there are now."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._phases = np.zeros((len(clock.PHASES), 0))
        self._moved, self._peaks = 0, list[int]()

    def add(self, lapped: Lapped, steps: int) -> None:
        """Count an epoch of `steps` updates."""
        phases = np.array([lapped.phases[name] for name in clock.PHASES])
        if phases.shape != self._phases.shape:  # ranks have died, or joined: begin anew
            self.__init__()  # type: ignore[misc]
            self._phases = np.zeros_like(phases)
        self._phases += phases
        self._moved += sum(lapped.moved_bytes)
        self._peaks = lapped.peak_memory_bytes
        self.seconds += lapped.here
        self.steps += steps

    def summary(self, *, owns_parts: bool) -> dict[str, Any]:
        """Return what summary.json holds, but for advice. With `owns_parts` ranks share updates."""
        phases = dict(zip(clock.PHASES, self._phases.tolist(), strict=True))
        busy = self._phases[[clock.COMPUTE, clock.DATA, clock.UPDATE]].sum(axis=0)
        return {
            "ranks": len(self._peaks),
            "steps": self.steps,
            "seconds": self.seconds,
            "phases": phases,
            "slowest": int(busy.argmax()),
            "moved_bytes": self._moved,
            "peak_memory_bytes": self._peaks,
            "efficiency": efficiency(phases, owns_parts=owns_parts),
        }


def efficiency(phases: dict[str, list[float]], *, owns_parts: bool) -> float:
    """Return the speed, as a share of that of as many single ranks that wait for nobody.

    One rank alone would compute all parts of the batch, and make the whole update: what it would
    take is added up from what the ranks measured.
    """
    ranks = len(phases["compute"])
    spent = sum(sum(phases[name]) for name in clock.PHASES[: clock.OTHER])
    update = sum(phases["update"]) / (1 if owns_parts else ranks)
    alone = sum(phases["compute"]) + sum(phases["data"]) + update
    return alone / spent if spent else 1.0


def peak_memory() -> int:
    """Return the most memory that this process had, in bytes: its resident set."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
