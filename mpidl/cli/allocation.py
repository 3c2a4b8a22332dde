"""Where `mpidl run` stands: the hosts that a scheduler gave to this job, by its environment."""

from __future__ import annotations

import itertools
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpidl import cores, launched
from mpidl.cli import launcher, places
from mpidl.cli.schedulers import base
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_HOSTS = 1_000_000  # that a list may stand for
FLUX = ("flux", "resource", "list", "-s", "up", "-n", "-o", "{nnodes} {ncores} {ngpus} {nodelist}")
NAME_THEM = "name the hosts with --hosts a:4,b:4"


@dataclass(frozen=True)
class Allocation:
    """What a scheduler gave to this job."""

    scheduler: str  #: SLURM, PBS, LSF or Flux
    hosts: Mapping[str, int]  #: ranks of each host, as they were asked for
    cores: Mapping[str, int] = field(default_factory=dict)  #: of each host, where they are told
    gpus: int = 0  #: of each host, where they are told


class Chosen(NamedTuple):
    """Where the ranks of a run are to be."""

    ranks: int
    hosts: dict[str, int] | None = None  #: their ranks, host by host; None where all run here
    cores: int | None = None  #: of a host, for its ranks; None where that is not known
    allocation: Allocation | None = None
    named: bool = False  #: whether the user has named the hosts


def find() -> Allocation | None:
    """Return the allocation in which this process runs, or None.

    Flux comes first: it may have been started within another scheduler's job. Raises
    InvalidArgument where there is one, and it does not tell its hosts.
    """
    given = os.environ.get
    if given("FLUX_URI"):
        return _flux()
    if given("SLURM_JOB_NODELIST"):
        return _slurm()
    if given("PBS_NODEFILE"):
        return _pbs(Path(os.environ["PBS_NODEFILE"]))
    if given("LSB_JOBID") and (given("LSB_MCPU_HOSTS") or given("LSB_DJOB_HOSTFILE")):
        return _lsf()
    return None


def choose(ranks: int | None, hosts: str) -> Chosen:
    """Return how many ranks to start, and where.

    On `hosts` (a:4,b:4) where they are named; else on those of the allocation, as many as it was
    asked for by default, host by host; fewer fill the first hosts, and more, up to its cores, are
    spread evenly; else here, 1 by default. Raises InvalidArgument for more, and where this is
    itself one of several ranks, each of which would start all.
    """
    if hosts:
        named = launcher.parse_hosts(hosts)
        room = sum(named.values())
        if ranks is not None and ranks > room:
            raise InvalidArgument(f"-n {ranks}: --hosts {hosts} has places for {room}")
        found = None
        with suppress(InvalidArgument):  # who names the hosts need not be told of them
            found = find()
        chosen = _first(ranks or room, named)
        return Chosen(ranks or room, chosen, _cores(chosen, found), found, named=True)
    name, copies = launched.size() or ("", 1)
    if copies > 1:
        raise InvalidArgument(
            f"{launched.by()} has started mpidl run {copies} times ({name}={copies}), and "
            "each would start all ranks; expected it once, without that, or python in its place"
        )
    found = find()
    if found is None:
        return Chosen(ranks or 1)
    asked = sum(found.hosts.values())
    ranks = asked if ranks is None else ranks
    chosen = _first(ranks, found.hosts) if ranks <= asked else _spread(ranks, found)
    # on one of several hosts they are named too: launchers read the allocation in their own way
    here = len(found.hosts) == 1 and places.is_here(next(iter(found.hosts)))
    return Chosen(ranks, None if here else chosen, _cores(chosen, found), found)


def _cores(hosts: Mapping[str, int], found: Allocation | None) -> int | None:
    """Return the cores that each of the hosts has for this job, at least; None: it is not known."""
    told = found.cores if found else {}
    if not all(name in told for name in hosts):
        return None
    here = [cores.available()] if any(map(places.is_here, hosts)) else []
    return min([told[name] for name in hosts] + here)


def _first(ranks: int, hosts: Mapping[str, int]) -> dict[str, int]:
    """Return the hosts that `ranks` fill, one after the other."""
    chosen, left = {}, ranks
    for name, count in hosts.items():
        if left:
            chosen[name] = min(count, left)
            left -= chosen[name]
    return chosen


def _spread(ranks: int, found: Allocation) -> dict[str, int]:
    """Return as many ranks for each host as its share of the cores is: more than were asked for."""
    room = {name: max(n, found.cores.get(name, 0)) for name, n in found.hosts.items()}
    if ranks > (most := sum(room.values())):
        more = {"SLURM": f"sbatch --ntasks={ranks}", "PBS": "qsub -l select=...:mpiprocs=...",
                "LSF": f"bsub -n {ranks}", "Flux": f"flux batch --nslots={ranks}"}  # fmt: skip
        raise InvalidArgument(
            f"-n {ranks}: the {found.scheduler} job has places for {most} ({_told(room)}); ask "
            f"for more ({more[found.scheduler]}), or let ranks share cores: --hosts "
            f"{_told(dict.fromkeys(room, -(-ranks // len(room))))}"
        )
    # as the seats of a parliament: each rank to the host with the most cores for one more
    chosen = dict.fromkeys(room, 0)
    for _ in range(ranks):
        chosen[max(room, key=lambda name: room[name] / (chosen[name] + 1))] += 1
    return {name: n for name, n in chosen.items() if n}


def _told(hosts: Mapping[str, int]) -> str:
    """Return hosts as --hosts takes them, the first of many."""
    words = [f"{name}:{n}" for name, n in itertools.islice(hosts.items(), 4)]
    return ",".join(words + ["..."] * (len(hosts) > len(words)))


# --- SLURM


def _slurm() -> Allocation:
    listed = os.environ["SLURM_JOB_NODELIST"]
    names = expand(listed)
    # in a step, which may have fewer hosts than the job, the first is the step's
    told = {name: os.environ.get(name, "") for name in ("SLURM_TASKS_PER_NODE",
                                                        "SLURM_JOB_CPUS_PER_NODE")}  # fmt: skip
    counts = {name: per_node(text) for name, text in told.items()}
    fitting = [numbers for numbers in counts.values() if len(numbers) == len(names)]
    if not fitting:
        said = ", ".join(f"{name}={text}" for name, text in told.items())
        raise InvalidArgument(
            f"SLURM_JOB_NODELIST={listed}, {said}: expected hosts and their ranks; {NAME_THEM}"
        )
    cores = counts["SLURM_JOB_CPUS_PER_NODE"]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return Allocation(
        "SLURM",
        dict(zip(names, fitting[0], strict=True)),
        dict(zip(names, cores, strict=True)) if len(cores) == len(names) else {},
        int(gpus) if gpus.isdecimal() else 0,
    )


def of_the_job() -> dict[str, str]:
    """Return what a step has changed, as the launchers in it need it: the job's own.

    In a shell that is a step on one of several nodes, the tasks are that step's, and the nodes the
    job's: Open MPI 5.0.11 then counts places that are not there.
    """
    names = expand(os.environ.get("SLURM_JOB_NODELIST", ""))
    cores = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")
    if len(per_node(os.environ.get("SLURM_TASKS_PER_NODE", ""))) == len(names) or not cores:
        return {}
    return {"SLURM_TASKS_PER_NODE": cores}


def expand(listed: str) -> list[str]:
    """Return the hosts of a list as SLURM and Flux write it: n[01-03,7],gpu5, r[1-2]n[1-4].

    Raises InvalidArgument.
    """
    names: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+|[\[\],]", listed):
        if word == ",":
            continue
        parts = re.split(r"\[([^\]]*)\]", word)
        choices = [_numbers(p) if i % 2 else [p] for i, p in enumerate(parts)]
        size = len(names) + math.prod(map(len, choices))
        if word in "[]" or size > MOST_HOSTS or size == len(names):
            raise InvalidArgument(f"hosts {listed!r}: expected such as n[01-03,7],gpu5")
        names += map("".join, itertools.product(*choices))
    return names


def _numbers(text: str) -> list[str]:
    """Return the numbers of 01-03,7 with their zeros; none where it is no such text."""
    numbers: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        first, last = (int(n or found[1]) for n in found.groups()) if found else (1, 0)
        if found is None or not 0 <= last - first < MOST_HOSTS:
            return []
        numbers += [str(n).zfill(len(found[1])) for n in range(first, last + 1)]
    return numbers


def per_node(text: str) -> list[int]:
    """Return the numbers that SLURM writes as 2(x3),1; none where it is no such text."""
    numbers: list[int] = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", word, re.ASCII)
        if found is None:
            return []
        numbers += [int(found[1])] * int(found[2] or 1)
    return numbers


# --- the others


def _pbs(file: Path) -> Allocation:
    """Return what $PBS_NODEFILE says: a line for each rank (mpiprocs), NCPUS cores of a host."""
    hosts = _counted(_lines("PBS_NODEFILE", file))
    cores = os.environ.get("NCPUS", "")
    known = cores.isdecimal() and int(cores) > 0
    return Allocation("PBS", hosts, dict.fromkeys(hosts, int(cores)) if known else {})


def _lsf() -> Allocation:
    """Return the slots of each host: LSB_MCPU_HOSTS is a 4 b 4, the file has a line for each."""
    words = os.environ.get("LSB_MCPU_HOSTS", "").split()
    if words and len(words) % 2 == 0 and all(n.isdecimal() and int(n) for n in words[1::2]):
        hosts = {name: int(n) for name, n in zip(words[::2], words[1::2], strict=True)}
    else:
        hosts = _counted(_lines("LSB_DJOB_HOSTFILE", Path(os.environ.get("LSB_DJOB_HOSTFILE", ""))))
    return Allocation("LSF", hosts, hosts)


def _flux() -> Allocation:
    """Ask Flux, which tells no number of ranks: one for each GPU, or else for each core."""
    try:
        told = base.ask(FLUX)
    except base.SchedulerFailed as error:
        raise InvalidArgument(f"FLUX_URI is set, but: {error}; {NAME_THEM}") from error
    cores: dict[str, int] = {}
    gpus = 0
    for line in told.splitlines():
        found = re.fullmatch(r"\s*(\d+) (\d+) (\d+) (\S*)\s*", line, re.ASCII)
        names = dict.fromkeys(expand(found[4])) if found else {}
        if found and names:
            cores |= dict.fromkeys(names, max(1, int(found[2]) // len(names)))
            gpus = int(found[3]) // len(names)
    if not cores:
        raise InvalidArgument(f"{' '.join(FLUX[:3])}: no hosts in {told.strip()!r}; {NAME_THEM}")
    return Allocation("Flux", dict.fromkeys(cores, gpus) if gpus else cores, cores, gpus)


def _lines(variable: str, file: Path) -> list[str]:
    try:
        lines = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{variable}={file}: {error}; {NAME_THEM}") from error
    if not lines:
        raise InvalidArgument(f"{variable}={file}: expected hosts in it; {NAME_THEM}")
    return lines


def _counted(names: list[str]) -> dict[str, int]:
    hosts = dict.fromkeys(names, 0)
    for name in names:
        hosts[name] += 1
    return hosts
