"""Which cores, how many threads and which GPU each rank of a node takes, and whether they clash.

`mpidl.init` looks once. A launcher that binds ranks to cores is left alone; so are numbers of
threads that the user has set.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl import array, config, cores
from mpidl.marks import some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpidl.world import World

MEANT = "(MPIDL_OVERSUBSCRIBE=1 if that is meant)"
SETTERS = tuple(
    f"{before}openblas_set_num_threads{after}" for before in ("scipy_", "") for after in ("64_", "")
)

_clash: str | None = None  # what `tell` is to say


class BindingWarning(RuntimeWarning):
    """Ranks of a node share cores or a GPU that each should have for itself."""


@dataclass(frozen=True)
class Seat:
    """What one rank of a node finds where it was put."""

    cpus: frozenset[int]  #: its affinity
    threads: int | None = None  #: that the user has set
    allocated: int | None = None  #: cores of each rank, as the scheduler tells
    quota: int | None = None  #: cores of its control groups, which the node's ranks share
    gpus: str | None = None  #: CUDA_VISIBLE_DEVICES


def own_seat() -> Seat:
    """Return that of this rank. Not collective."""
    return Seat(
        frozenset(os.sched_getaffinity(0)),
        config.threads(),
        config.allocated_cores(),
        cores.quota(),
        config.visible_gpus(),
    )


def start(world: World) -> None:
    """Choose this rank's GPU, its threads, and with MPIDL_BIND=cores its cores. Collective."""
    global _clash
    mode = config.bind()
    if world.size == 1:
        array.bind_device(0)
        return
    own = own_seat()
    seats = world.local.allgather(own)
    if len(seats) != world.local_size:  # spawned in another's place: it is alone until it joins
        seats = [own] * world.local_size
    array.bind_device(number_among(seats, world.local_rank))
    taken, _clash = bound(seats, cores.topology()) if mode == "cores" else (seats, None)
    cpus = taken[world.local_rank].cpus
    if cpus != own.cpus:
        _move(cpus)
    wanted = [seat.threads or share(taken, i) for i, seat in enumerate(taken)]
    if own.threads is None and (len(seats) > 1 or own.allocated is not None):
        _use_threads(wanted[world.local_rank])
    host = world.MPI.Get_processor_name()
    _clash = _clash or clash(taken, wanted, host, os.cpu_count() or 1)
    if world.local_rank or config.oversubscribe():
        _clash = None


def tell() -> None:
    """Warn of what `start` has found, once: on one rank of each node. Not collective."""
    global _clash
    text, _clash = _clash, None
    if text:
        warnings.warn(text, BindingWarning, stacklevel=3)


def number_among(seats: Sequence[Seat], local_rank: int) -> int:
    """Return this rank's number among those that see the same GPUs.

    Of those it takes the one of that number. Ranks that see one each, whether all call it 0
    (--gpus-per-task=1 with control groups) or by its number, so take that.
    """
    own = seats[local_rank].gpus
    return sum(seat.gpus == own for seat in seats[:local_rank])


def bound(
    seats: Sequence[Seat], places: Mapping[int, cores.Place]
) -> tuple[list[Seat], str | None]:
    """Return the seats with cores of their own, where all ranks had the same; and a problem."""
    if len({seat.cpus for seat in seats}) > 1 or len(seats) == 1:
        return list(seats), None  # the launcher has bound them
    parts = cores.split(seats[0].cpus, len(seats), places)
    if parts is None:
        text = (
            f"MPIDL_BIND=cores: {len(seats)} ranks on CPUs {cores.told(seats[0].cpus)}: not bound"
        )
        return list(seats), f"{text}, expected a core for each {MEANT}"
    return [_seated(seat, part) for seat, part in zip(seats, parts, strict=True)], None


def _seated(seat: Seat, cpus: set[int]) -> Seat:
    return Seat(frozenset(cpus), seat.threads, seat.allocated, seat.quota, seat.gpus)


def share(seats: Sequence[Seat], local_rank: int) -> int:
    """Return how many threads a rank can have: its part of the cores that it shares with others.

    At most as many as the scheduler gave it, and its part of the quota.
    """
    own = seats[local_rank]
    others = sum(not own.cpus.isdisjoint(seat.cpus) for seat in seats)
    most = [len(own.cpus) // others, own.allocated or len(own.cpus)]
    if own.quota is not None:
        most.append(own.quota // len(seats))
    return max(1, min(most))


def clash(
    seats: Sequence[Seat], threads: Sequence[int], host: str, machine_cores: int
) -> str | None:
    """Return, in a line, how ranks of a node have more threads than cores; None where they fit.

    `threads` are those of each rank. Ranks that are bound to a few cores must fit on those.
    """
    everywhere = frozenset[int]().union(*(seat.cpus for seat in seats))
    for cpus in sorted(
        {*(seat.cpus for seat in seats), everywhere}, key=lambda c: (len(c), min(c))
    ):
        inside = [i for i, seat in enumerate(seats) if seat.cpus <= cpus]
        quotas = [q for i in inside if (q := seats[i].quota) is not None]
        room = min([len(cpus), *quotas])
        if sum(threads[i] for i in inside) <= room:
            continue
        who = f"all {len(inside)}" if len(inside) == len(seats) else f"{len(inside)}"
        if len(cpus) == 1 and len(inside) > 1 and machine_cores > 1:
            return (
                f"{who} ranks of {host} are bound to core {cores.told(cpus)}, of {machine_cores}: "
                f"ask for cores of each (srun --cpus-per-task=N, --cpu-bind=cores) {MEANT}"
            )
        where = f"CPUs {cores.told(cpus)}" if room == len(cpus) else f"a quota of {room} cores"
        s = "s" * (len(inside) > 1)
        if len(inside) > room:
            rest = f"start at most {room} there, or give them more cores {MEANT}"
            return f"{len(inside)} rank{s} of {host} share {where}: {rest}"
        count = max(threads[i] for i in inside)
        return (
            f"{len(inside)} rank{s} of {host} with {count} threads each on {where}: "
            f"expected OMP_NUM_THREADS={room // len(inside)} at most {MEANT}"
        )
    return None


def check_gpus(world: World, gpu: str | None) -> None:
    """Warn, once a node, where two of its ranks use one GPU. Collective.

    `gpu` tells this rank's from all others, as `array.gpu_of` returns it; None for none.
    """
    with world.mark.enter("comparing GPUs"):
        found = world.local.allgather(gpu)
    if world.local_rank or len(found) != world.local_size or config.oversubscribe():
        return  # a rank in another's place is alone until it joins
    text = shared_gpus(found, world.members[world.node], world.MPI.Get_processor_name())
    if text:
        warnings.warn(text, BindingWarning, stacklevel=4)


def check_models(world: World, model: str | None) -> None:
    """Warn, once, where the ranks' GPUs are not of one `model`; None for no GPU. Collective."""
    with world.mark.enter("comparing GPUs"):
        found = world.comm.allgather(model)
    text = mixed_gpus(found)
    if text and world.rank == 0:
        warnings.warn(text, BindingWarning, stacklevel=4)


def mixed_gpus(found: Sequence[str | None]) -> str | None:
    """Return how many ranks have which model of GPU; None where it is one."""
    counts = Counter(model for model in found if model is not None)
    if len(counts) < 2:
        return None
    told = ", ".join(f"{count} x {model}" for model, count in counts.most_common())
    return f"the ranks' GPUs are of several models, {told}: each step takes as long as the slowest"


def shared_gpus(found: Sequence[str | None], ranks: Sequence[int], host: str) -> str | None:
    """Return which of a node's `ranks` have the same GPU; None where each has its own."""
    users: dict[str, list[int]] = {}
    for gpu, rank in zip(found, ranks, strict=True):
        if gpu is not None:
            users.setdefault(gpu, []).append(rank)
    shared = [f"{some(who)} share GPU {gpu.split()[0]}" for gpu, who in users.items() if who[1:]]
    if not shared:
        return None
    return (
        f"on {host} {', '.join(shared)}: start as many ranks as GPUs there, or let each see its "
        f"own (srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES) {MEANT}"
    )


def _move(cpus: frozenset[int]) -> None:
    """Bind all threads of this process: libraries have started some already."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it may have ended
            os.sched_setaffinity(int(task.name), cpus)


def _use_threads(count: int) -> None:
    """Let libraries that are loaded, or will be, compute with so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    for path in {line.split()[-1] for line in _maps() if "openblas" in line}:
        with suppress(OSError):
            library = ctypes.CDLL(path)
            for name in SETTERS:
                setter = getattr(library, name, None)
                if setter is not None:
                    setter(ctypes.c_int(count))
                    break
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):
        torch.set_num_threads(count)


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
