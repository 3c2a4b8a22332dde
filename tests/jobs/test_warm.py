"""A run that was started again goes on from what its ranks left in the node's memory."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import pytest

from mpidl.elastic import MEMORY
from tests import job
from tests.conftest import SEED

TRAIN = """
import hashlib, json, os, sys, time
import numpy as np
import mpidl
from mpidl import config, data, nn, optim

world = mpidl.init()
seed, folder, resume, dies = json.loads(sys.argv[1])
rng = np.random.default_rng(seed)
x, y = rng.standard_normal((500, 20), np.float32), rng.integers(0, 4, 500)


class Pacing(data.ArrayDataset):
    taken = 0

    def take(self, indices):
        Pacing.taken += 1
        if dies:
            time.sleep(0.01)
        if dies == Pacing.taken:
            sys.exit(1) if config.attempt() else os.kill(os.getpid(), 9)
        return super().take(indices)


nn.seed(1)
model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 4))
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optim.Adam(1e-3), microbatches=4, elastic=config.run_id() is not None,
    quiet=True, checkpoint=folder or None, resume=resume,
)
begun = trainer.replica.steps
history = trainer.fit(Pacing(x, y), 6, 50, seed=2)
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.tobytes())
if world.rank == 0:
    losses = [epoch.loss for epoch in history]
    print(json.dumps([losses, digest.hexdigest(), trainer.replica.steps]), begun)
"""


def attempt(
    mpi: str, ranks: int, script: str, run: str, number: int, *arguments: object
) -> job.Result:
    line = (sys.executable, "-m", "mpidl", "run", "-n", str(ranks), script)
    settings = {"MPIDL_RUN": run, "MPIDL_ATTEMPT": str(number)} if run else {}
    return job.execute(mpi, *line, json.dumps([SEED, *arguments]), timeout=60, **settings)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> object:
    script = job.script(tmp_path_factory.mktemp("alone"), TRAIN)
    result = attempt("openmpi", 1, script, "", 0, "", "auto", 0)
    assert result.status == 0, result
    return json.loads(result.output.rpartition(" ")[0])


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "and_disk"])
def test_goes_on_from_memory(disk: bool, expected: object, tmp_path: Path) -> None:
    script, run = job.script(tmp_path, TRAIN), secrets.token_hex(6)
    folder, resume = (str(tmp_path / "run"), False) if disk else ("", "auto")
    first = attempt("mpich", 2, script, run, 0, folder, resume, 80)
    assert first.status != 0
    assert list(MEMORY.glob(f"mpidl-{run}-*"))
    second = attempt("openmpi", 3, script, run, 1, folder, resume, 40)
    assert second.status != 0
    assert list(MEMORY.glob(f"mpidl-{run}-*-1-0"))
    assert not list(MEMORY.glob(f"mpidl-{run}-*-0-0"))
    last = attempt("openmpi", 1, script, run, 2, folder, resume, 0)
    assert last.status == 0, last
    told, begun = last.output.rsplit(" ", 1)
    assert json.loads(told) == expected, last
    assert int(begun) > 35  # two attempts made 40 and 10 updates and more
    assert not list(MEMORY.glob(f"mpidl-{run}-*"))


def test_begins_anew_but_goes_on_with_its_own(expected: object, tmp_path: Path) -> None:
    """`resume=False` passes by what other runs left, and not what former attempts did."""
    script, folder = job.script(tmp_path, TRAIN), str(tmp_path / "run")
    other = attempt("openmpi", 1, script, secrets.token_hex(6), 0, folder, False, 0)
    assert other.status == 0, other
    run = secrets.token_hex(6)
    for number in (0, 1):
        again = attempt("openmpi", 1, script, run, number, folder, False, 0)
        assert again.status == 0, again
        told, begun = again.output.rsplit(" ", 1)
        assert json.loads(told) == expected
        assert int(begun) == (60 if number else 0)


def test_a_run_of_which_no_rank_is_left_is_started_again(expected: object, tmp_path: Path) -> None:
    script = job.script(tmp_path, TRAIN)
    line = (sys.executable, "-m", "mpidl", "run", "--elastic", "--restarts", "1", "-n", "2", script)
    result = job.execute("openmpi", *line, json.dumps([SEED, "", "auto", 80]), timeout=60)
    assert result.status == 0, result
    assert "attempt 1 of at most 1 begins with 2 ranks" in result.errors, result
    told, begun = result.output.rsplit(" ", 1)
    assert json.loads(told) == expected, result
    assert int(begun) > 20, result
