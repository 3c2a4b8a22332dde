"""Microbatches: whole jobs on any number of ranks, under any MPI, come to the same bits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import job
from tests.conftest import ALL, SEED

TRAIN = """
import hashlib, json, sys
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
rng = np.random.default_rng(int(sys.argv[1]))
x = rng.standard_normal((200, 1, 10, 10), np.float32)
train = data.ArrayDataset(x, rng.integers(0, 4, 200))
nn.seed(1)
model = nn.Sequential(
    *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
    *(nn.Linear(256, 200), nn.ReLU(), nn.Linear(200, 4)),
)
optimizer = optim.Adam(optim.schedules.cosine(1e-2, 12))
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optimizer, microbatches=8, clip_norm=0.5, quiet=True
)
history = trainer.fit(train, 2, 36, evaluate=train, seed=2)  # 36 / 8 and 20 / 8 are not whole
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.tobytes())
losses = [(epoch.loss, epoch.metrics) for epoch in history]
if world.rank == 0:
    print(json.dumps([losses, digest.hexdigest()]))
"""
JOBS = [("openmpi", 3), ("openmpi", 8), ("mpich", 2)]
MORE = [
    ("openmpi", 1),
    ("openmpi", 2),
    ("openmpi", 4),
    ("mpich", 1),
    ("mpich", 3),
    ("mpich", 4),
    ("mpich", 8),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process without a launcher says."""
    script = job.script(tmp_path_factory.mktemp("alone"), TRAIN)
    result = job.execute(None, sys.executable, script, str(SEED))
    assert result.status == 0, result
    assert len(json.loads(result.output)[0]) == 2
    return result.output


@pytest.mark.parametrize(("mpi_of_job", "ranks"), JOBS + MORE * ALL)
def test_same_bits(mpi_of_job: str, ranks: int, expected: str, tmp_path: Path) -> None:
    script = job.script(tmp_path, TRAIN)
    result = job.run(mpi_of_job, ranks, script, str(SEED))
    assert result.status == 0, result
    assert result.output == expected


def test_code_of_the_page_runs(tmp_path: Path) -> None:
    page = (job.ROOT / "docs/same_bits.md").read_text()
    pytest.importorskip("torch")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    result = job.run("openmpi", 2, job.script(tmp_path, "\n".join(blocks)), cwd=tmp_path)
    assert result.status == 0, result
