"""Whether what a process takes stays the same over time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

WARM_UP = 0.25  # of the time: caches fill, and allocators come to what they need
MOST = 400  # points of a fit
MIB = 2**20
#: How much a name of `endure.Sampler.look` may grow by after the warm-up, however long that is. Of
#: bytes: parts of an arena, the snapshots' history of epochs. PSS is a process's share of pages
#: that others map, too, and grows where those end.
BOUNDS = {
    "rss": 1.0 * MIB,
    "anonymous": 1.0 * MIB,
    "pss": 4.0 * MIB,
    "shm": 0.25 * MIB,
    "fds": 1.0,
    "threads": 1.0,
    "communicators": 1.0,
}
#: Those that are left have more microbatches each, whose gradients they keep, and more state.
MORE_EACH = {"rss": 8.0 * MIB, "anonymous": 8.0 * MIB, "pss": 16.0 * MIB}
#: Of each recovery, in bytes: Open MPI 5.0.11 keeps a communicator (7.3 KiB) whose blocking
#: collective was cut short, freed or not; a rank may lose that of its world and of its node.
RECOVERY = 16 * 1024


@dataclass(frozen=True)
class Samples:
    """What one rank told: a row each, in the order of time."""

    times: npt.NDArray[np.float64]
    values: dict[str, npt.NDArray[np.float64]]  #: by name

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Read a file of `endure`, whose last line may be cut short: its rank was killed."""
        lines = path.read_text().split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        names = set(rows[0]) - {"time"} if rows else set()
        values = {name: np.array([row[name] for row in rows], np.float64) for name in names}
        return cls(np.array([row["time"] for row in rows], np.float64), values)

    def growths(self) -> dict[str, float]:
        """Return what each name of BOUNDS has grown by after the warm-up, by the fit."""
        if len(self.times) < 8:
            return {}
        first, last = self.times[0], self.times[-1]
        later = self.times >= first + WARM_UP * (last - first)
        return {name: growth(self.times[later], self.values[name][later]) for name in BOUNDS}


def growth(times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """Return the slope, in units per second, times the duration.

    The slope is the median of those between any two points (Theil 1950; Sen 1968): no few points
    that lie apart, such as those during a checkpoint, change it.
    """
    chosen = np.linspace(0, len(times) - 1, min(MOST, len(times))).astype(int)
    x, y = times[chosen], values[chosen]
    i, j = np.triu_indices(len(x), 1)
    slopes = (y[j] - y[i]) / (x[j] - x[i])
    return float(np.median(slopes) * (x[-1] - x[0]))


def problems(growths: dict[str, float], *, fewer: bool = False, recoveries: float = 0) -> list[str]:
    """Return what has grown by more than it may; `fewer`: ranks were lost meanwhile."""
    bounds = {**BOUNDS, **MORE_EACH} if fewer else dict(BOUNDS)
    for name in ("rss", "anonymous", "pss"):
        bounds[name] += RECOVERY * recoveries
    return [
        f"{name} grew by {grown:.0f}, more than {bounds[name]:.0f}"
        for name, grown in growths.items()
        if grown >= bounds[name]
    ]
