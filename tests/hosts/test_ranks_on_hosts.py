"""Ranks on several hosts: where World says they are, and the bodies of tests/ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import job

if TYPE_CHECKING:
    from tests.hosts.conftest import Up

TELL = """
import json, socket, sys
import mpidl

world = mpidl.init()
place = [world.node, world.nodes, world.local_rank, world.local_size, world.members]
sys.stdout.write(json.dumps([world.rank, socket.gethostname(), *place]) + "\\n")
"""
# Ranks on each host, whether they are dealt out one by one, and the ranks of each node.
PLACEMENTS = {
    "2 + 2": ([2, 2], False, [[0, 1], [2, 3]]),
    "1 + 2 + 1": ([1, 2, 1], False, [[0], [1, 2], [3]]),
    "round robin": ([2, 2], True, [[0, 2], [1, 3]]),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_who_is_where(mpi: str, placement: str, hosts: Up, tmp_path: Path) -> None:
    ranks, round_robin, members = PLACEMENTS[placement]
    script = job.script(tmp_path, TELL)
    several = hosts(len(ranks))
    result = several.run(mpi, ranks, sys.executable, script, round_robin=round_robin)
    assert result.status == 0, result
    told = sorted(json.loads(line) for line in result.output.splitlines())
    expected = [
        [rank, f"t{node}", node, len(members), local_rank, len(of_node), members]
        for node, of_node in enumerate(members)
        for local_rank, rank in enumerate(of_node)
    ]
    assert told == sorted(expected)


# The others, which tests/test_ranks.py runs, take long, ask nothing of a network, or leave all
# of it to MPI.
FEWER = (
    "not 1000000 and not (allreduce or sharded or adasum) "
    "and (not test_parallel or float64 or every_rank or without_backward)"
)


def fail_if(result: job.Result) -> None:
    if result.status:
        pytest.fail(str(result), pytrace=False)


@pytest.mark.parametrize(
    ("mpi", "placement", "bodies"),
    [
        ("openmpi", "2 + 2", "parallel"),
        ("openmpi", "1 + 2 + 1", "strategies parallel"),
        ("openmpi", "round robin", "trainer"),
        ("mpich", "2 + 2", "average batch_norm frozen"),
        pytest.param("mpich", "1 + 2 + 1", "strategies parallel", marks=pytest.mark.soak),
    ],
    indirect=["mpi"],
)
def test_bodies(mpi: str, placement: str, bodies: str, hosts: Up, tmp_path: Path) -> None:
    ranks, round_robin, _ = PLACEMENTS[placement]
    files = [f"tests/ranks/test_{name}.py" for name in bodies.split()]
    chosen = [*files, "-k", FEWER]
    several = hosts(len(ranks))
    fail_if(several.run_bodies(mpi, ranks, tmp_path, *chosen, round_robin=round_robin))


def test_bodies_on_links_that_delay_and_lose(hosts: Up, tmp_path: Path) -> None:
    two = hosts(2, rate="1gbit", delay="200us", loss=0.1)
    chosen = ("tests/ranks/test_parallel.py", "-k", "20_steps and uneven and float32")
    fail_if(two.run_bodies("openmpi", [1, 1], tmp_path, *chosen))
