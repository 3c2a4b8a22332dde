"""Run by `mpidl doctor` on two ranks: what MPI says once it is started. Prints JSON on rank 0."""

from __future__ import annotations

import json
import warnings

import numpy as np

import mpidl
from mpidl import cuda_aware, strategies

MODEL_BYTES = 100_000_000  # of a model of 25 M parameters, for which "auto" chooses
TRIAL_SECONDS = 15.0  # less than doctor's patience
LEVELS = {0: "single", 1: "funneled", 2: "serialized", 3: "multiple"}


def main() -> None:
    """Start MPI and tell."""
    world = mpidl.init()
    mean = mpidl.average(np.full(1000, world.rank, np.float32))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        choice = strategies.make("auto", world, MODEL_BYTES)
    if world.rank == 0:
        print(
            json.dumps(
                {
                    "ranks": world.size,
                    "ranks_per_node": world.local_size,
                    "nodes": world.nodes,
                    "thread_level": LEVELS[world.MPI.Query_thread()],
                    "cuda_aware": str(cuda_aware.answer(seconds=TRIAL_SECONDS)),
                    "says_cuda_aware": cuda_aware.hint(),
                    "strategy": f"{choice.name} ({choice.why})",
                    "warnings": [str(warning.message) for warning in told],
                    "allreduce_works": bool((mean == (world.size - 1) / 2).all()),
                }
            )
        )


if __name__ == "__main__":
    main()
