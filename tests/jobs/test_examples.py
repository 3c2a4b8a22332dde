"""The examples: the same training on any number of ranks, with any strategy, under any MPI."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mpidl import __version__
from mpidl.strategies import RULES, STRATEGIES, own
from tests import examples_page, job
from tests.jobs.test_failures import TRACEBACK, only_mpich

OWN = list(own())
DIGITS = "examples/digits_mlp.py"
EPOCHS, SEED = 3, 5
BATCH = 96  # the 1,438 samples make 14 batches of 96 and one of 94: parts of unequal size too
STEPS = 15 * EPOCHS

# Ranks add float32 gradients in different orders, which changes the last bit of some, and momentum
# makes the difference grow: measured over all cases below, the loss differs by 4e-8 of itself after
# 1 epoch, 1.3e-7 after 3, 1.3e-6 after 12. A rank that is left out or weighs wrongly costs more.
TOLERANCE = 1e-5

JOBS = [("openmpi", 1), ("openmpi", 2), ("openmpi", 3), ("openmpi", 4), ("mpich", 2)]

# Runs the example once for each strategy, in one job: to import scikit-learn takes the longest.
ALL_STRATEGIES = """
import runpy, sys

out, example, *options = sys.argv[1:]
sys.path.insert(0, "examples")
for strategy in OWN:
    sys.argv = [example, *options, "--strategy", strategy, "--out", f"{out}/new/{strategy}"]
    runpy.run_path(example, run_name="__main__")
"""


class Runs:
    """The run folders of each job, which is started when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs = folder, dict[tuple[str, int], str]()

    def of(self, mpi: str, ranks: int, strategy: str) -> tuple[Path, list[dict[str, Any]]]:
        """Return a run folder and its epochs."""
        folder = self.folder / f"{mpi} {ranks}"
        if (mpi, ranks) not in self.outputs:
            folder.mkdir()
            script = job.script(folder, f"OWN = {OWN}\n{ALL_STRATEGIES}")
            options = ("--epochs", EPOCHS, "--batch-size", BATCH, "--seed", SEED)
            result = job.run(mpi, ranks, script, str(folder), DIGITS, *map(str, options))
            assert result.status == 0, result
            examples_page.check("digits_mlp.py", result.output)
            self.outputs[mpi, ranks] = result.output
        out = folder / "new" / strategy
        return out, job.epochs(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("strategy", OWN)
@pytest.mark.parametrize(("mpi", "ranks"), JOBS, indirect=["mpi"])
def test_digits_learn_alike(mpi: str, ranks: int, strategy: str, runs: Runs) -> None:
    out, epochs = runs.of(mpi, ranks, strategy)
    _, alone = runs.of("openmpi", 1, "allreduce")

    assert [e["epoch"] for e in epochs] == list(range(1, EPOCHS + 1))
    assert epochs[-1]["steps"] == STEPS
    assert epochs[-1]["loss"] < 0.5 < 1.5 < epochs[0]["loss"]
    for mine, wanted in zip(epochs, alone, strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        assert mine["metrics"]["loss"] == pytest.approx(wanted["metrics"]["loss"], rel=TOLERANCE)
        # one digit of the 359 may lie on the border between two answers
        assert mine["metrics"]["accuracy"] == pytest.approx(
            wanted["metrics"]["accuracy"], abs=1.5 / 359
        )
        assert mine["samples_per_second"] == pytest.approx(1438 / mine["seconds"])

    accuracy = epochs[-1]["metrics"]["accuracy"]
    told = f"test accuracy  {accuracy:.2%} on 359 digits never trained on"
    told_by_rank_0 = runs.outputs[mpi, ranks].split("strategy       ")[1:]
    assert [told in text for text in told_by_rank_0][OWN.index(strategy)]
    assert "".join(told_by_rank_0).count("test accuracy") == len(OWN)  # and by no other

    config = json.loads((out / "config.json").read_text())
    wanted = {"strategy": strategy, "ranks": ranks, "seed": SEED, "batch_size": BATCH}
    assert {key: config[key] for key in wanted} == wanted
    assert (config["epochs"], config["samples"], config["nodes"]) == (EPOCHS, 1438, 1)
    assert config["hosts"] == [platform.node()] * ranks
    assert config["mpi"].startswith({"openmpi": "Open MPI v", "mpich": "MPICH"}[mpi])
    assert config["versions"] == {
        "mpidl": __version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }
    assert config["command"][0] == DIGITS and config["device"] == "cpu"
    assert config["optimizer"]["SGD"]["lr"] == 0.1


@only_mpich  # test_wheel.py does it with Open MPI
def test_it_learns_to_read(mpi: str, tmp_path: Path) -> None:
    result = job.run(mpi, 2, DIGITS, "--epochs", "12", "--out", str(tmp_path / "run"))
    assert result.status == 0, result
    assert job.epochs(tmp_path / "run")[-1]["metrics"]["accuracy"] >= 0.95, result


def test_another_seed_is_another_training(runs: Runs, tmp_path: Path) -> None:
    _, alone = runs.of("openmpi", 1, "allreduce")
    options = ("--epochs", "1", "--batch-size", str(BATCH), "--seed", str(SEED + 1))
    result = job.run("openmpi", 1, DIGITS, *options, "--out", str(tmp_path))
    assert result.status == 0, result
    (epoch,) = job.epochs(tmp_path)
    assert epoch["loss"] != pytest.approx(alone[0]["loss"], rel=100 * TOLERANCE)


def test_a_folder_that_cannot_be_written(mpi: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "run"
    result = job.run(mpi, 2, DIGITS, "--epochs", "1", "--out", str(out))
    assert result.status != 0, result
    assert result.errors.count(f"InvalidArgument: rank 0: cannot write the run folder {out}") == 1
    assert result.errors.count("mpidl: rank 0 of 2") == result.errors.count("mpidl: rank"), result
    assert (tmp_path / "file").read_text() == "kept"


@only_mpich
def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(
    mpi: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    text = f"""
import sys
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
model = nn.Sequential(nn.Linear(6, 3))
samples = data.ArrayDataset(np.ones((9, 6), np.float32), np.arange(9) % 3)
out = {str(tmp_path / "file" / "run")!r}
trainer = mpidl.Trainer(model, nn.cross_entropy, optim.SGD(lr=0.1), out=out, quiet=True)
try:
    trainer.fit(samples, epochs=1, batch_size=4)
except mpidl.errors.InvalidArgument as error:
    sys.stdout.write(f"{{world.rank}} told\\n")
"""
    result = job.run(mpi, 3, job.script(tmp_path, text), timeout=20)
    assert (result.status, sorted(result.output.splitlines())) == (
        0,
        ["0 told", "1 told", "2 told"],
    ), result


def test_an_unknown_strategy(mpi: str) -> None:
    result = job.run(mpi, 2, DIGITS, "--strategy", "rong", timeout=20)
    assert result.status != 0, result
    known = ", ".join(sorted([*STRATEGIES, *RULES, "auto"]))
    message = f"UnknownStrategy: every rank: unknown strategy 'rong'; known are: {known}"
    assert result.errors.count(message) == 1, result
    assert result.errors.count("mpidl: rank 0 of 2") == result.errors.count("mpidl: rank"), result


def test_help_needs_no_mpi() -> None:
    result = job.execute("openmpi", sys.executable, DIGITS, "--help", MPI4PY_LIBMPI="/nonexistent")
    assert result.status == 0, result
    assert "--strategy" in result.output and TRACEBACK not in result.errors, result
