"""`mpidl bench allreduce --device cuda`, in ranks: averages of gradients that lie on GPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import cuda_aware
from mpidl.array import device_namespace, gpu_model, to_numpy
from mpidl.bench import jobs, machine, timing
from mpidl.bench.methods import DTYPE, Method, calls
from mpidl.errors import MpidlError
from mpidl.strategies import ON_DEVICE, STRATEGIES, own

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.world import World

NAMES = (*own(), "nccl")


def measure(world: World, sizes: list[int], turns: int) -> dict[str, Any]:
    """Return {"machine", "rows", "absent"} as `allreduce_ranks.measure` does. Collective.

    `copy_bound` copies a gradient on all GPUs at once. "moved_bytes" of all ranks together are what
    is really read and written by `hierarchical` and by that, and "over_bound" how fast, in units of
    its speed. The time of a call ends when the GPU has done it.
    """
    xp = device_namespace("cuda")
    absent: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for nbytes in sizes:
        rows += _rows(world, xp, nbytes // DTYPE.itemsize, turns, absent)
    facts = {**machine.facts(world), "gpu": gpu_model(), "cupy": getattr(xp, "__version__", None)}
    facts["cuda_aware"] = cuda_aware.agreed(world)
    return {"machine": facts, "rows": rows, "absent": absent}


def _rows(
    world: World, xp: Any, size: int, turns: int, absent: dict[str, str]
) -> list[dict[str, Any]]:
    compared: list[Method] = []
    moved: dict[str, int] = {}
    closes = []
    for name in NAMES:
        try:
            found, close = of_strategy(name, world, xp, size)
        except MpidlError as error:
            if not error.collective:
                raise
            absent[name] = str(error)
            continue
        compared += found
        closes.append(close)
        if name == "hierarchical":  # all gradients are read, one mean is written
            moved["hierarchical reduce"] = (world.size + 1) * size * DTYPE.itemsize
    bound = copy_bound(world, xp, size)
    compared.append(bound)
    moved[bound.key] = 2 * world.size * size * DTYPE.itemsize
    check(world, xp, compared)
    loops = {m.key: timing.loops_of(world, _waited(xp, m, world)) for m in compared}
    timed = {
        m.key: partial(timing.of_one, world, _waited(xp, m, world), loops[m.key]) for m in compared
    }
    taken = timing.in_turns(timed, turns)
    for close in closes:
        close()
    rows = []
    base = moved[bound.key] / timing.quartiles(taken[bound.key])[1]
    for m in compared:
        low, median, high = timing.quartiles(taken[m.key])
        row: dict[str, Any] = {"method": m.name, "what": m.what, "bytes": size * DTYPE.itemsize}
        row |= {"ranks": world.size, "median_s": median, "low_s": low, "high_s": high}
        row |= {"gb_per_s": row["bytes"] / median / 1e9, "loops": loops[m.key]}
        if m.key in moved:
            speed = moved[m.key] / median
            row |= {"moved_bytes": moved[m.key], "over_bound": speed / base}
        rows.append(row)
    return rows


def of_strategy(
    name: str, world: World, xp: Any, size: int
) -> tuple[list[Method], Callable[[], None]]:
    """Return both methods of a strategy for (size,) float32 on GPUs, and its `close`. Collective.

    With "average" every rank gets the mean, as if it were parameters; "reduce" ends at its owner.
    """
    strategy = ON_DEVICE.get(name, STRATEGIES[name])(world)
    param, grad = strategy.allocate(size, DTYPE, xp)
    reduce, keep, publish = calls(strategy, param, grad)
    owned = strategy.owned(size)
    at_owner = Method(name, "reduce", grad, reduce, param, owned, keep=keep)
    everywhere = Method(name, "average", grad, publish, param, slice(0, size))
    return [everywhere, at_owner], strategy.close


def copy_bound(world: World, xp: Any, size: int) -> Method:
    """Return a copy of (size,) within each GPU, on all ranks at once."""
    source, to = xp.zeros(size, DTYPE), xp.zeros(size, DTYPE)

    def run(_: float) -> None:
        to[...] = source
        world.barrier()  # or the ranks would drift apart

    return Method("copy_bound", "bound", source, run, to, slice(0, 0))


def check(world: World, xp: Any, methods: list[Method]) -> None:
    """Raise MpidlError on every rank where a method's mean is wrong on any. Collective."""
    rng = np.random.default_rng([world.rank, *np.random.SeedSequence().generate_state(2)])
    local = rng.standard_normal(methods[0].grad.size).astype(DTYPE)
    expected = world.sum(local.astype(np.float64)) / world.size
    for method in methods:
        if method.what == "bound":
            continue
        method.grad[:] = xp.asarray(local)
        world.barrier()
        (method.keep or method.run)(1 / world.size)
        found = to_numpy(method.result)[method.part]
        error = np.abs(found - expected[method.part]).max(initial=0.0)
        wrong = MpidlError(f"{method.key} is wrong by {error:.3g}: its times mean nothing")
        world.agree(None if error < 1e-5 * world.size else wrong)
        method.grad[:] = 0  # a sum of sums, over and over, would overflow


def _waited(xp: Any, method: Method, world: World) -> Callable[[], None]:
    def call() -> None:
        method.run(1 / world.size)
        xp.cuda.get_current_stream().synchronize()

    return call


if __name__ == "__main__":
    jobs.in_ranks(measure)
