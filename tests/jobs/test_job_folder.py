"""MPIDL_OUT: the folder of a job, to which any `Trainer` writes, and from which it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import job

TRAIN = """
import os, signal, sys
import numpy as np
import mpidl
from mpidl import data, nn, optim

stop, other = int(sys.argv[1]), sys.argv[2:]
world = mpidl.init()
if world.rank == 1:
    del os.environ["MPIDL_OUT"]  # rank 0's counts

def make(**how):
    nn.seed(0)
    def loss(output, target):
        made.append(1)
        if len(made) == stop and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return nn.mse(output, target)
    made = []
    model = nn.Linear(3, 1)
    return mpidl.Trainer(model, loss, optim.SGD(lr=0.1), metrics={}, accumulate=2, **how)

x = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
samples = data.ArrayDataset(x, x[:, :1])
trainer = make(**(dict(out=other[0], checkpoint=other[1]) if other else {}))
history = trainer.fit(samples, epochs=3, batch_size=6)
second = make()
second.fit(samples, epochs=1, batch_size=60)
if world.rank == 0:
    sys.stdout.write(str([epoch.loss for epoch in history]))
"""


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())  # type: ignore[no-any-return]


WRITTEN = {"config.json", "metrics.jsonl", "state.json", "times.jsonl"}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_script_that_says_nothing_goes_on_in_the_folder_of_its_job(tmp_path: Path) -> None:
    script, run = job.script(tmp_path, TRAIN), tmp_path / "run"
    through = job.run("openmpi", 2, script, "0", MPIDL_OUT=str(tmp_path / "through"))
    assert through.status == 0, through
    stopped = job.run("openmpi", 2, script, "14", MPIDL_OUT=str(run))
    assert stopped.status == 75, stopped
    assert files(run) == {*WRITTEN, "checkpoints", "again"}
    found = state(run)
    # stopped in the second epoch of 10 batches, of which two make a step
    assert (found["state"], found["epoch"], found["epochs"]) == ("stopped", 2, 3)
    assert (found["steps"], found["ranks"]) == (15, 2)
    assert 6 <= found["step"] <= 8 and found["loss"] > 0 and found["samples_per_second"] > 0

    again = job.run("openmpi", 2, script, "0", MPIDL_OUT=str(run))
    assert again.status == 0, again
    assert again.output == through.output
    found = state(run)
    assert (found["state"], found["step"], found["steps"]) == ("finished", 15, 15)
    assert (found["epoch"], found["epochs"]) == (3, 3)
    assert files(run) >= {"config.json.1", "metrics.jsonl.1", "trainer-2"}
    assert "trainer-2" not in files(tmp_path / "through/trainer-2")
    assert state(run / "trainer-2")["steps"] == 1


def test_what_a_script_says_counts(tmp_path: Path) -> None:
    words = (job.script(tmp_path, TRAIN), "0", str(tmp_path / "out"), str(tmp_path / "kept"))
    done = job.run("openmpi", 2, *words, MPIDL_OUT=str(tmp_path / "run"))
    assert done.status == 0, done
    assert files(tmp_path / "out") == {*WRITTEN, "summary.json"}
    assert any(name.startswith("step-") for name in files(tmp_path / "kept"))
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700  # for nobody else
    assert files(tmp_path / "run") == {"trainer-2"}


def test_a_state_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "run/state.new").mkdir(parents=True)
    done = job.run("openmpi", 2, job.script(tmp_path, TRAIN), "0", MPIDL_OUT=str(tmp_path / "run"))
    assert done.status == 0, done
    assert "state.json" not in files(tmp_path / "run")
    assert state(tmp_path / "run/trainer-2")["state"] == "finished"
