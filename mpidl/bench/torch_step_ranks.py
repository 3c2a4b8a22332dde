"""`mpidl bench step --framework torch`, in ranks: PyTorch's steps, made parallel."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from mpidl.bench import jobs, machine, replicas, rivals
from mpidl.bench.step_ranks import part_of, rows_of
from mpidl.strategies import own

if TYPE_CHECKING:
    from mpidl.world import World


def measure(
    world: World,
    models: list[str],
    turns: int,
    methods: list[str] | None = None,
    samples: int | None = None,
) -> dict[str, Any]:
    """Return {"machine", "rows", "absent"}. Collective.

    `methods`, by default all: "local" is the step without communication, "ddp" and "horovod" are
    these, all others strategies of `mpidl.torch.DataParallel`.
    """
    from mpidl.bench import torch_models

    wanted = [m for m in (*own(), "auto", "ddp", "horovod") if methods is None or m in methods]
    absent: dict[str, str] = {}
    for method, attempt in (("ddp", rivals.join_gloo), ("horovod", rivals.try_horovod)):
        reason = attempt(world) if method in wanted else None
        if reason is not None:
            absent[method] = reason
            wanted.remove(method)
    report: list[dict[str, Any]] = []
    for name in models:
        rows = torch_models.ROWS[name] if samples is None else part_of(world, samples)
        made = [
            replicas.in_torch(
                method, name, rows, world.rank, parallel=parallel, base="local", models=torch_models
            )
            for method, parallel in (("local", None), *((m, m) for m in wanted))
        ]
        report += rows_of(world, name, made, turns)
        for replica in made:
            replica.close()
        del made, replica
        gc.collect()  # before the next model needs memory
    if "ddp" in wanted:
        rivals.leave_gloo()
    return {"machine": machine.facts(world), "rows": report, "absent": absent}


if __name__ == "__main__":
    jobs.in_ranks(measure)
