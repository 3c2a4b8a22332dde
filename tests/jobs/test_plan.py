"""`mpidl plan --measure`, and whether the strategies send what the plan says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import job

PLAN = (sys.executable, "-m", "mpidl", "plan", "--params", "1e6", "--step-ms", "10")

# Every rank as a node of its own; what each sends is counted, at the messages themselves.
SENT = """
import json
import numpy as np
import mpidl
from mpidl import plan
from mpidl.strategies import STRATEGIES

world = mpidl.init().apart()
size = 3 * 131072 + 24 * int(world.broadcast(np.random.default_rng().integers(1000)))
constants = plan.Constants(plan.Link(1e-6, 1e9))
topology = plan.Topology(world.size)

class Counting:
    sent = 0
    def __init__(self, comm): self.comm = comm
    def __getattr__(self, name): return getattr(self.comm, name)
    def Isend(self, message, *where):
        Counting.sent += message.nbytes
        return self.comm.Isend(message, *where)

counted = mpidl.world.replace(world, comm=Counting(world.comm))
told = {}
for strategy, codec in [("ring", None), ("hierarchical", None), ("hierarchical", "bf16"),
                        ("hierarchical", "int8"), ("hierarchical", "signsgd")]:
    options = {} if codec is None else {"codec": codec}
    made = STRATEGIES[strategy](counted, **options)
    param, grad = made.allocate(size, np.dtype(np.float32), np)
    grad[:] = np.random.default_rng().standard_normal(size)
    Counting.sent = 0
    for _ in made.reduce(grad, 1 / world.size):
        pass
    made.share(param)
    sent = sum(world.gather(Counting.sent)) / world.size
    job = plan.Job(size * 4, 4, codec)
    told[f"{strategy} {codec}"] = sent, plan.times(strategy, job, topology, constants).wire
if world.rank == 0:
    print(json.dumps(told))
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_strategies_send_what_the_plan_says(mpi: str, ranks: int, tmp_path: Path) -> None:
    result = job.run(mpi, ranks, job.script(tmp_path, SENT))
    assert result.status == 0, result
    told = json.loads(result.output.splitlines()[-1])
    assert len(told) == 5
    for name, (sent, predicted) in told.items():
        assert predicted == pytest.approx(sent, rel=0.02), name


def test_constants_are_measured_in_ranks(mpi: str) -> None:
    line = (
        *PLAN,
        "--ranks",
        "2",
        "--ranks-per-node",
        "2",
        "--rate",
        "1gbit",
        "--measure",
        "--json",
    )
    result = job.execute(mpi, *line)
    assert result.status == 0, result
    found = json.loads(result.output)
    constants = found["constants"]
    assert constants["algorithms"] == {"openmpi": "openmpi", "mpich": "textbook"}[mpi]
    assert constants["wire"]["rate"] == pytest.approx(1e9 / 8, rel=0.05)  # as told
    assert 1e8 < constants["memory_rate"] < 1e13
    assert 1e-13 < constants["add_seconds"] < 1e-7
    assert 1e7 < constants["local"]["rate"] < 1e12
    assert 0 < constants["local"]["latency"] < 0.1
    assert all(1e-12 < s < 1e-6 for pair in constants["codecs"].values() for s in pair)
    seconds = {row["strategy"]: row["average_ms"] for row in found["rows"]}
    assert min(seconds.values()) > 0
