"""`mpidl bench trace`, in ranks: the same steps with and without a trace, in turns."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpidl
from mpidl import clock
from mpidl.bench import jobs, machine, replicas, timing
from mpidl.trace.recorder import Recorder

if TYPE_CHECKING:
    from mpidl.bench.replicas import Replica
    from mpidl.world import World

#: Names of `engine_models`, and samples of a rank: steps of some 3 and 12 ms on one core.
MODELS = (("mlp", 16), ("mlp", 128))
BLOCK_SECONDS = 0.1  # of steps that are timed as one
LOOPS = 20_000


def measure(world: World, turns: int) -> dict[str, Any]:
    """Return {"machine", "rows", "nanoseconds"}. Collective.

    A row has the milliseconds of a step without ("off") and with a trace ("on"), medians over
    blocks of steps; "over" is the median of the ratios of both blocks of a turn, with quartiles;
    "by_parts" what they should be by the time of each event, and of two ranges a step, where the
    machine does too much else. "nanoseconds" are those of one event, of writing it, and of an
    `mpidl.range` with and without a trace.
    """
    with tempfile.TemporaryDirectory(prefix="mpidl-bench-") as folder:
        process = {"rank": world.rank, "ranks": world.size, "seconds": time.perf_counter()}
        recorder = Recorder(Path(folder) / "part", process, 1 << 30)
        recorder.start()
        recorder.rest()
        spent = {"range, no trace": _each(_one_range)}
        recorder.resume()
        spent["range"] = _each(_one_range)
        recorder.flush()
        spent["event"] = _each(lambda: recorder.interval(0, 0.0, 1.0))
        start = time.perf_counter()
        recorder.flush()
        spent["writing it"] = 1e9 * (time.perf_counter() - start) / (3 * LOOPS)
        recorder.rest()
        rows = []
        for name, samples in MODELS:
            replica = replicas.in_mpidl("auto", "auto", world, name, samples, world.rank)
            row: dict[str, Any] = {"model": name, "samples": samples, "ranks": world.size}
            row |= _compare(world, replica, recorder, turns)
            each = row["events"] * (spent["event"] + spent["writing it"])
            ranges = 2 * (spent["range"] - spent["range, no trace"] - spent["event"])
            rows.append(row | {"by_parts": 1 + (each + ranges) / 1e6 / row["off_ms"]})
            replica.close()
        recorder.close()
    return {"machine": machine.facts(world), "rows": rows, "nanoseconds": spent}


def _compare(world: World, replica: Replica, recorder: Recorder, turns: int) -> dict[str, Any]:
    """Time blocks of steps, with and without a trace, in turns. Collective."""

    def steps(count: int) -> None:
        for _ in clock.fetched(range(count)):
            with mpidl.range("backward"):
                replica.backward()
            with mpidl.range("update"):
                replica.update()

    steps(3)
    count = max(1, round(BLOCK_SECONDS / timing.of_one(world, lambda: steps(1), 3)))
    count = int(world.broadcast(count))

    def block(*, traced: bool) -> float:
        if traced:
            recorder.resume()
        seconds = timing.of_one(world, lambda: steps(count))
        recorder.rest()
        return seconds / count

    measures = {"off": lambda: block(traced=False), "on": lambda: block(traced=True)}
    before = recorder.taken
    taken = timing.in_turns(measures, turns)
    events = (recorder.taken - before) / (count * (turns + timing.WARM_UP))
    ratios = np.array(taken["on"]) / np.array(taken["off"])
    low, over, high = timing.quartiles(ratios.tolist())
    medians = {f"{name}_ms": 1e3 * timing.quartiles(taken[name])[1] for name in taken}
    return {**medians, "over": over, "low": low, "high": high, "events": events}


def _one_range() -> None:
    with mpidl.range("a range"):
        pass


def _each(call: Any) -> float:
    """Return the nanoseconds of a call, the quickest of three loops."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(LOOPS):
            call()
        found.append(1e9 * (time.perf_counter() - start) / LOOPS)
    return min(found)


if __name__ == "__main__":
    jobs.in_ranks(measure)
