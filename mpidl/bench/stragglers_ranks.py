"""`mpidl bench stragglers`, in ranks: how fast the others are while one rank is slow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional, nn, optim
from mpidl.bench import jobs, machine
from mpidl.parallel import DataParallel
from mpidl.strategies import STRATEGIES, ParameterServer

if TYPE_CHECKING:
    from mpidl.strategies import Strategy
    from mpidl.world import World

COMPUTE_SECONDS = 0.02  # of a step: asleep, so that cores do not matter
PIXELS, HIDDEN, CLASSES, ROWS = 64, 256, 10, 8
ASYNCHRONOUS = "asynchronous"


def measure(world: World, steps: int, slow_down: float, staleness: int) -> dict[str, Any]:
    """Return {"machine", "rows"}: steps a second of the others, with a slow rank and without.

    The last rank's computing takes `slow_down` times as long. Collective.
    """
    rows = []
    for method in (ASYNCHRONOUS, "parameter_server", "allreduce"):
        rates = [_rate(world, method, steps, factor, staleness) for factor in (1.0, slow_down)]
        rows.append(
            {
                "method": method,
                "ranks": world.size,
                "slow_down": slow_down,
                "steps_per_s": rates[0],
                "steps_per_s_beside_a_slow_rank": rates[1],
                "kept": rates[1] / rates[0],
            }
        )
    return {"machine": machine.facts(world), "rows": rows}


def _rate(world: World, method: str, steps: int, factor: float, staleness: int) -> float:
    """Return the steps a second of the slowest of the others. Collective."""
    strategy: Strategy
    if method == ASYNCHRONOUS:
        strategy = ParameterServer(world, asynchronous=True, staleness=staleness)
    else:
        strategy = STRATEGIES[method](world)
    nn.seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    replica = DataParallel(model, optim.SGD(0.01), strategy, world=world)
    rng = np.random.default_rng(world.rank)
    x = rng.standard_normal((ROWS, PIXELS)).astype(np.float32)
    y = rng.integers(0, CLASSES, ROWS)
    slow = world.rank == world.size - 1
    own = int(steps / factor) if slow and method == ASYNCHRONOUS else steps
    world.barrier()
    start = time.perf_counter()
    for _ in range(own):
        functional.cross_entropy(model(x), y).backward()
        time.sleep(COMPUTE_SECONDS * (factor if slow else 1))
        replica.step()
    rate = own / (time.perf_counter() - start)
    replica.synchronize()
    replica.close()
    return min(found for rank, found in enumerate(world.gather(rate)) if rank < world.size - 1)


if __name__ == "__main__":
    jobs.in_ranks(measure)
