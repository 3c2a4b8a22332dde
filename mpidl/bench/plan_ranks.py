"""`mpidl bench plan`, in ranks: the constants of this cluster, then what the strategies take."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mpidl.bench import jobs, machine, methods, timing
from mpidl.plan import measure as constants
from mpidl.strategies import own

if TYPE_CHECKING:
    from mpidl.world import World


def measure(world: World, sizes: list[int], turns: int) -> dict[str, Any]:
    """Return {"machine", "constants", "rows"}: a row for each strategy and size. Collective."""
    found = constants.measure(world)
    rows = []
    for nbytes in sizes:
        made = {
            name: methods.of_strategy(name, world, nbytes // methods.DTYPE.itemsize)
            for name in own()
        }
        calls = {
            name: partial(timing.of_one, world, partial(both[0].run, 1 / world.size))
            for name, (both, _) in made.items()
        }
        taken = timing.in_turns(calls, turns)
        for name, seconds in taken.items():
            low, median, high = timing.quartiles(seconds)
            rows.append(
                {
                    "strategy": name,
                    "bytes": nbytes,
                    "ranks": world.size,
                    "nodes": world.nodes,
                    "measured_s": median,
                    "low_s": low,
                    "high_s": high,
                }
            )
        for _, close in made.values():
            close()
    return {"machine": machine.facts(world), "constants": found, "rows": rows}


if __name__ == "__main__":
    jobs.in_ranks(measure)
