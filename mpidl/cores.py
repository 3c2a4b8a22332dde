"""The cores that a process may use, and how the ranks of a node share them. No MPI here."""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
CPUS = Path("/sys/devices/system/cpu")

#: Of a logical CPU: its NUMA node, its package, and its core there. Hyperthreads share all three.
Place = tuple[int, int, int]


def available() -> int:
    """Return how many cores this process may use: its affinity, and its container's quota."""
    own = len(os.sched_getaffinity(0))
    return min(own, quota() or own)


def quota() -> int | None:
    """Return the cores that the quotas of this process's control groups come to; None of none.

    Linux cgroup v2: cpu.max holds "QUOTA PERIOD" or "max PERIOD", and those of all groups above
    count too. Parts of a core do not, but one is always there.
    """
    found = [cores for folder in _folders() if (cores := _of(folder / "cpu.max")) is not None]
    return min(found, default=None)


def _folders() -> Iterator[Path]:
    """Yield the folders of this process's groups, from its own up to that of all."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[3:] for line in lines if line.startswith("0::/")), "/")
    group = CGROUPS / path.lstrip("/")
    if ".." not in group.parts:  # of a process that has been moved out of its namespace
        yield from (folder for folder in (group, *group.parents) if CGROUPS in folder.parents)
    yield CGROUPS


def _of(path: Path) -> int | None:
    try:
        most, period = path.read_text().split()
        return None if most == "max" else max(1, int(most) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def told(cpus: Iterable[int]) -> str:
    """Return numbers as the kernel lists them: "0-3,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def listed(text: str) -> set[int]:
    """Return the numbers of a list as `told` returns it. Raises ValueError."""
    found: set[int] = set()
    for word in text.strip().split(","):
        first, _, last = word.partition("-")
        if word:
            found.update(range(int(first), int(last or first) + 1))
    return found


@cache
def topology() -> dict[int, Place]:
    """Return the place of each logical CPU, as Linux tells it; those untold have their own core."""
    found: dict[int, Place] = {}
    for folder in CPUS.glob("cpu[0-9]*"):
        cpu = int(folder.name[3:])
        nodes = [int(node.name[4:]) for node in folder.glob("node[0-9]*")]
        package = _number(folder / "topology/physical_package_id", 0)
        core = _number(folder / "topology/core_id", cpu)
        found[cpu] = nodes[0] if nodes else 0, package, core
    return found


def _number(path: Path, default: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return default


def split(cpus: Iterable[int], ranks: int, places: Mapping[int, Place]) -> list[set[int]] | None:
    """Return the CPUs of each of `ranks` ranks: whole cores, neighbours, in equal numbers.

    With their hyperthreads, as far as those are among `cpus`; and in the order of NUMA nodes, so
    that few ranks lie on two. Numbers differ by one where they must. None where there are fewer
    cores than ranks.
    """
    cores: dict[Place, set[int]] = {}
    for cpu in cpus:
        cores.setdefault(places.get(cpu, (0, 0, cpu)), set()).add(cpu)
    order: Sequence[set[int]] = [cores[place] for place in sorted(cores)]
    if len(order) < ranks:
        return None
    cuts = [len(order) * i // ranks for i in range(ranks + 1)]
    return [set[int]().union(*order[a:b]) for a, b in pairwise(cuts)]
