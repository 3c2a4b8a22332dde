"""Times of collective calls, taken in turns: what else the machine does then hits all of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpidl.world import World

    Call = Callable[[], object]

WARM_UP = 2  # turns
MIN_SECONDS = 0.01
MIN_SECONDS_OF_WIRE = 0.1  # a link that rested carries a burst at first
MAX_LOOPS = 1000


def of_one(world: World, call: Call, loops: int = 1) -> float:
    """Return the seconds that one of `loops` calls takes the slowest rank. Collective.

    All ranks begin together. The same number on every rank.
    """
    world.barrier()
    start = time.perf_counter()
    for _ in range(loops):
        call()
    seconds = (time.perf_counter() - start) / loops
    slowest: float = world.comm.allreduce(seconds, world.MPI.MAX)
    return slowest


def loops_of(world: World, call: Call) -> int:
    """Return how many calls last MIN_SECONDS, or MAX_LOOPS; the same on every rank. Collective.

    Between nodes, MIN_SECONDS_OF_WIRE.
    """
    wanted_seconds = MIN_SECONDS if world.nodes == 1 else MIN_SECONDS_OF_WIRE
    count = 1
    while count < MAX_LOOPS:
        seconds = count * of_one(world, call, count)
        if seconds >= wanted_seconds:
            break
        wanted = int(count * wanted_seconds / max(seconds, 1e-9)) + 1
        count = min(MAX_LOOPS, max(2 * count, wanted))
    return count


def in_turns(
    measures: Mapping[str, Callable[[], float]], turns: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Return the seconds that each of `measures` returns, by name: one number a turn. Collective.

    Each turn makes every measurement once, in an order drawn anew: so none has always the same
    one before it. `warm_up` turns come first.
    """
    taken: dict[str, list[float]] = {name: [] for name in measures}
    rng = np.random.default_rng(0)  # the same order on every rank
    for turn in range(-warm_up, turns):
        for i in rng.permutation(len(measures)):
            name = list(measures)[i]
            seconds = measures[name]()
            if turn >= 0:
                taken[name].append(seconds)
    return taken


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = map(float, np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high
