"""`mpidl bench allreduce`, in ranks: check and time every way to average."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.bench import jobs, machine, methods, rivals, timing
from mpidl.errors import NoSharedMemory
from mpidl.strategies import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.bench.methods import Method
    from mpidl.world import World

    Make = Callable[[World, int], Method]


def measure(world: World, sizes: list[int], turns: int) -> dict[str, Any]:
    """Return {"machine", "rows", "absent"}, for gradients of `sizes` bytes. Collective."""
    absent: dict[str, str] = {}
    others: list[Make] = [methods.mpi_allreduce, methods.memory_bound]
    rivals_here: list[tuple[str, Callable[[World], str | None], Make]] = [
        ("gloo", rivals.join_gloo, methods.gloo),
        ("horovod", rivals.try_horovod, methods.horovod),
    ]
    for name, join, make in rivals_here:
        reason = join(world)
        if reason is None:
            others.append(make)
        else:
            absent[name] = reason
    rows = [row for size in sizes for row in _rows(world, size, turns, others, absent)]
    if "gloo" not in absent:
        rivals.leave_gloo()
    return {"machine": machine.facts(world), "rows": rows, "absent": absent}


def _rows(
    world: World,
    nbytes: int,
    turns: int,
    others: list[Make],
    absent: dict[str, str],
) -> list[dict[str, Any]]:
    """Measure all methods on one size, alternately, between two checks. Collective."""
    size = nbytes // methods.DTYPE.itemsize
    compared: list[Method] = []
    closes = []
    for name in STRATEGIES:
        try:
            of_strategy, close = methods.of_strategy(name, world, size)
        except NoSharedMemory as error:
            absent[name] = str(error)
            continue
        compared += of_strategy
        closes.append(close)
    compared += [make(world, size) for make in others]
    rng = np.random.default_rng([world.rank, *np.random.SeedSequence().generate_state(2)])
    methods.check(world, compared, rng)
    for method in compared:
        method.grad[:] = 0  # a sum of sums, over and over, would overflow
    loops: dict[str, int] = {}
    for method in compared:
        with method.at_work():
            loops[method.key] = timing.loops_of(world, partial(method.run, 1 / world.size))
    timed = {m.key: partial(_seconds, world, m, loops[m.key]) for m in compared}
    taken = timing.in_turns(timed, turns)
    methods.check(world, compared, rng)
    for close in closes:
        close()
    rows = []
    for method in compared:
        low, median, high = timing.quartiles(taken[method.key])
        row: dict[str, Any] = {"method": method.name, "what": method.what}
        row |= {"bytes": size * methods.DTYPE.itemsize, "ranks": world.size}
        row |= {"median_s": median, "low_s": low, "high_s": high}
        rows.append(row | {"gb_per_s": row["bytes"] / median / 1e9, "loops": loops[method.key]})
    return rows


def _seconds(world: World, method: Method, loops: int) -> float:
    with method.at_work():
        return timing.of_one(world, partial(method.run, 1 / world.size), loops)


if __name__ == "__main__":
    jobs.in_ranks(measure)
