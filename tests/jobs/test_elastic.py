"""Ranks that are killed: the others go on, to the same bits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import job
from tests.conftest import SEED

TRAIN = """
import hashlib, json, os, sys
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
rank, folder = world.rank, sys.argv[2]
kills = {int(r): int(step) for r, step in (kill.split(":") for kill in sys.argv[3:])}
rng = np.random.default_rng(int(sys.argv[1]))
x, y = rng.standard_normal((500, 20), np.float32), rng.integers(0, 4, 500)


class Killing(data.ArrayDataset):
    taken = 0

    def take(self, indices):
        Killing.taken += 1
        if kills.get(rank) == Killing.taken:
            os.kill(os.getpid(), 9)
        return super().take(indices)


nn.seed(1)
model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 4))
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optim.Adam(1e-3), microbatches=4, elastic=True, quiet=True,
    checkpoint=folder or None,
)
history = trainer.fit(Killing(x, y), 6, 50, seed=2)
again = trainer.fit(data.ArrayDataset(x, y), 1, 50, seed=2)
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.tobytes())
losses = [epoch.loss for epoch in history + again]
if trainer.world.rank == 0:
    told = [losses, digest.hexdigest(), trainer.replica.steps]
    print(json.dumps(told), trainer.world.size, trainer._elastic.recoveries)
"""
ELASTIC = (sys.executable, "-m", "mpidl", "run", "--elastic", "-n")
LEFT = Path("/dev/shm")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = job.script(tmp_path_factory.mktemp("alone"), TRAIN)
    result = job.execute("openmpi", sys.executable, script, str(SEED), "")
    assert result.status == 0, result
    return result.output.rsplit(" ", 2)[0]


@pytest.mark.parametrize(
    ("kills", "left"),
    [(["1:40"], 2), (["0:25", "2:26"], 1), (["0:1", "1:90"], 1)],
    ids=str,
)
def test_the_others_go_on(kills: list[str], left: int, expected: str, tmp_path: Path) -> None:
    before = set(LEFT.glob("mpidl-*"))
    script = job.script(tmp_path, TRAIN)
    disk = str(tmp_path / "run") if left == 2 else ""
    line = (*ELASTIC, "3", script, str(SEED), disk, *kills)
    result = job.execute("openmpi", *line, timeout=60)
    assert result.status == 0, result
    told, size, recoveries = result.output.rsplit(" ", 2)
    assert json.loads(told) == json.loads(expected), result
    assert (int(size), int(recoveries) > 0) == (left, True)
    assert set(LEFT.glob("mpidl-*")) <= before


WRONG = """
import mpidl
from mpidl import nn, optim
mpidl.Trainer(nn.Linear(3, 2), nn.mse, optim.SGD(0.1), elastic=True, {options})
"""


@pytest.mark.parametrize(
    ("options", "told"),
    [("", "start with mpidl run --elastic"), ("local_steps=2", "without fault tolerance")],
)
def test_where_it_cannot_be(options: str, told: str, tmp_path: Path) -> None:
    script = job.script(tmp_path, WRONG.replace("{options}", options))
    result = job.run("openmpi", 2, script)
    assert result.status == 1
    assert re.search(rf"InvalidArgument: every rank: elastic=True with .*{told}", result.errors)


def test_an_mpi_that_ends_all_ranks() -> None:
    result = job.execute("mpich", *ELASTIC, "2", __file__)
    assert result.status == 2
    assert "--elastic: MPICH" in result.errors
    assert "expected Open MPI 5" in result.errors
