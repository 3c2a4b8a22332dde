"""Ranks that are killed and replaced: the world grows back, and the bits stay the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import job
from tests.conftest import SEED

TRAIN = """
import hashlib, json, os, sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
rank, size, (seed, folder, *kills) = world.rank, world.size, sys.argv[1:]
spawned = world.MPI.Comm.Get_parent() != world.MPI.COMM_NULL
assert world.broadcast(rank) == rank or not spawned  # it is alone
rng = np.random.default_rng(int(seed))
x, y = rng.standard_normal((500, 20), np.float32), rng.integers(0, 4, 500)


class Killing(data.ArrayDataset):
    taken = 0

    def take(self, indices):
        Killing.taken += 1
        kill = f"{'new' if spawned else 'old'}:{rank}:{Killing.taken}"
        if kill in kills and not os.path.exists(f"{folder}/{kill}"):  # not a second time
            open(f"{folder}/{kill}", "x").close()
            os.kill(os.getpid(), 9)
        if trainer.world.size < size and "quick" not in kills:
            time.sleep(0.04)  # there is time for a replacement
        return super().take(indices)


if spawned and "raises" in kills:
    raise KeyError("in the replacement")
nn.seed(1)
model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 4))
disk = {"checkpoint": folder + "/run", "out": folder + "/out"} if "disk" in kills else {}
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optim.Adam(1e-3), microbatches=4, elastic=True, quiet=True, **disk
)
print(f"FOLDER {trainer._elastic.folder}", file=sys.stderr, flush=True)
history = trainer.fit(data.ArrayDataset(x, y), 1, 50, seed=2)
history += trainer.fit(Killing(x, y), 5, 50, seed=2)
if "stays" in kills and not spawned:
    time.sleep(2)
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.tobytes())
told = [[epoch.loss for epoch in history], digest.hexdigest(), trainer.replica.steps]
print(f"{json.dumps(told)} {trainer.world.size} {rank} {trainer._elastic.recoveries}", flush=True)
if disk and trainer.world.rank == 0:
    lines = map(json.loads, open(folder + "/out/metrics.jsonl"))
    assert sum(line["kind"] == "epoch" for line in lines) == 6
    trainer.saver.checkpoints.finish()
"""
ELASTIC = (sys.executable, "-m", "mpidl", "run", "--elastic")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = job.script(tmp_path_factory.mktemp("alone"), TRAIN)
    result = job.execute("openmpi", sys.executable, script, str(SEED), "")
    assert result.status == 0, result
    return result.output.rsplit(" ", 3)[0]


def train(ranks: int, folder: Path, *words: str) -> job.Result:
    script = job.script(folder, TRAIN)
    line = (*ELASTIC, "--replace", "-n", str(ranks), script, str(SEED), str(folder), *words)
    result = job.execute("openmpi", *line, timeout=100)
    assert result.status == 0, result
    assert "Warning" not in result.errors, result
    folders = re.findall("FOLDER (/dev/shm/.*)", result.errors)
    assert folders
    assert not any(Path(folder).exists() for folder in folders), result
    return result


def check(result: job.Result, expected: str, size: int, numbers: list[int]) -> None:
    """All ranks tell of the same bits, and of a world of `size`."""
    lines = [line.rsplit(" ", 3) for line in result.output.splitlines()]
    assert all(json.loads(told) == json.loads(expected) for told, *_ in lines), result
    assert {int(found) for _, found, *_ in lines} == {size}, result
    assert sorted(int(number) for *_, number, _ in lines) == numbers, result


ONE_BY_ONE = ["old:1:8", "new:1:6"], ["old:0:5"], ["old:0:5", "old:2:5", "disk"]
MORE = ["old:0:5", "new:0:3", "old:1:20", "disk"], ["old:2:1", "old:0:2", "new:2:1", "new:0:9"]


@pytest.mark.parametrize(
    "kills",
    [
        *ONE_BY_ONE[:1],
        *(pytest.param(kills, marks=pytest.mark.soak) for kills in MORE + ONE_BY_ONE[1:]),
    ],
    ids=str,
)
def test_the_world_grows_back(kills: list[str], expected: str, tmp_path: Path) -> None:
    ranks = 3 if any(":2:" in kill for kill in kills) else 2
    check(train(ranks, tmp_path, *kills), expected, ranks, list(range(ranks)))


def test_a_replacement_that_fails_is_told_of_once(expected: str, tmp_path: Path) -> None:
    result = train(2, tmp_path, "old:0:5", "raises")
    check(result, expected, 1, [1])
    assert result.errors.count("no replacement for rank 0") == 1, result
    assert result.errors.count("KeyError: 'in the replacement'") == 3, result


@pytest.mark.soak
def test_a_replacement_that_comes_too_late_ends(expected: str, tmp_path: Path) -> None:
    check(train(2, tmp_path, "old:1:47", "quick", "stays"), expected, 1, [0])


def test_too_few_ranks_end_the_run(tmp_path: Path) -> None:
    script = job.script(tmp_path, TRAIN)
    words = (script, str(SEED), str(tmp_path), "old:1:5")
    result = job.execute("openmpi", *ELASTIC, "--min-ranks", "2", "-n", "2", *words)
    assert result.status, result
    assert "ranks were killed: 1 rank is left, and --min-ranks is 2" in result.errors, result


def test_options_that_need_another() -> None:
    for option in (["--replace"], ["--min-ranks", "2"]):
        line = (sys.executable, "-m", "mpidl", "run", *option, "-n", "2", __file__)
        result = job.execute("openmpi", *line)
        assert (result.status, "--elastic" in result.errors) == (2, True), result
