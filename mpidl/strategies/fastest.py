"""Which strategy is the fastest for models on GPUs: each that can be is tried at the start."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mpidl.strategies.base import Strategy
    from mpidl.world import World

TRIAL_BYTES = 64 << 20  # of a gradient: longer ones take as long for each byte
TURNS = 3
SHOWN = 90  # characters of why one cannot be


def fastest(
    world: World, size: int, kinds: Mapping[str, Callable[[World], Strategy]]
) -> tuple[str, str]:
    """Return the name of the strategy that averages `size` bytes in the least time, and why.

    Collective, and the same on every rank: what counts is the slowest rank's best turn. Those that
    cannot be here are left out; of `kinds` the first is taken where none can be measured.
    """
    seconds: dict[str, float] = {}
    without = []
    for name, kind in kinds.items():
        try:
            seconds[name] = _seconds(world, kind, max(4, min(size, TRIAL_BYTES)) // 4)
        except MpidlError as error:  # noqa: PERF203  # on every rank: it was raised together
            if not error.collective:
                raise
            text = str(error).removeprefix("every rank: ").removeprefix("rank 0: ")
            text = text.removeprefix(f'strategy "{name}": ')
            without.append(f"not {name}: {text if len(text) <= SHOWN else text[:SHOWN] + '...'}")
    if not seconds:
        return next(iter(kinds)), "; ".join(without)
    name = min(seconds, key=lambda one: seconds[one])
    told = ", ".join(f"{one} {1e3 * took:.3g} ms" for one, took in seconds.items())
    mib = min(size, TRIAL_BYTES) / (1 << 20)
    return name, "; ".join([f"measured on {mib:.3g} MiB: {told}", *without])


def _seconds(world: World, kind: Callable[[World], Strategy], length: int) -> float:
    """Return the time of one average and its publishing, on the slowest rank."""
    xp = sys.modules["cupy"]
    strategy = kind(world)
    best = float("inf")
    try:
        param, grad = strategy.allocate(length, np.dtype(np.float32), xp)
        for turn in range(TURNS + 1):
            xp.cuda.get_current_stream().synchronize()
            world.barrier()
            start = time.perf_counter()
            for _ in strategy.reduce(grad, 1 / world.size):
                pass
            strategy.share(param)
            xp.cuda.get_current_stream().synchronize()
            if turn:  # the first compiles kernels
                best = min(best, time.perf_counter() - start)
    finally:
        strategy.close()
    return max(world.gather(best))
