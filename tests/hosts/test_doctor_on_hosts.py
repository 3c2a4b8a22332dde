"""`mpidl doctor --hosts`, with a host that is not there, and one whose link is slow."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from tests import job
from tests.hosts.conftest import SCRIPT, Up

SLOW = 200e6  # bits a second


@pytest.mark.parametrize(
    "mpi", ["openmpi", pytest.param("mpich", marks=pytest.mark.soak)], indirect=True
)
def test_each_host_that_is_not_well_is_named(mpi: str, hosts: Up) -> None:
    three = hosts(3)
    three.do("rate", "t1", "200mbit")
    line = (SCRIPT, "run", "t0", sys.executable, "-m", "mpidl", "doctor", "--json", "--hosts")
    settings = {"HOSTS_DIR": str(three.folder), "OPENBLAS_NUM_THREADS": "1"}
    result = job.execute(mpi, *line, "t0,t1,t2,t9", timeout=120, **settings)
    assert (result.status, result.errors) == (1, ""), result
    told = json.loads(result.output)
    (problem,) = told["problems"]
    assert problem.startswith("t9: not reached: "), result
    assert list(told["hosts"]) == ["t0", "t1", "t2"]
    assert {one["host"] for one in told["hosts"].values()} == {"t0", "t1", "t2"}
    slow = [text for text in told["advice"] if text.startswith("t1: ")]
    assert len(slow) == 1 and "at best, the others" in slow[0], result
    found = told["measured"]
    assert found["left"] == 0 and found["names"] == ["t0", "t1", "t2"], result
    pairs = {(a, b): rate for a, b, _, rate in found["pairs"]}
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    assert pairs[0, 2] > 2 * SLOW > max(pairs[0, 1], pairs[1, 2]), result
    # these hosts have one clock
    assert np.all([abs(ahead) <= uncertainty + 1e-4 for ahead, uncertainty in found["clocks"]])
    for traffic, moved in zip(found["traffic"], found["moved"], strict=True):
        assert traffic["eth0"] > moved > 0, result
    texts = [one["text"] for one in told["findings"]]
    assert "interfaces that MPI uses: eth0 everywhere" in texts, result
    assert f"Python: {sys.version.split()[0]} everywhere" in texts, result
