"""`mpidl run --restarts` where a host is killed, falls silent, or is cut off and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import job
from tests.hosts.conftest import SCRIPT
from tests.jobs.test_interrupt import running

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hosts.conftest import Hosts, Up

RECOVERY_SECONDS = 15.0  # from the fault to the next complete step

# Each rank notes when it has made which step: ATTEMPT RANK HOST STEP TIME.
TRAIN = """
import os, socket, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
where = f"{os.environ['MPIDL_ATTEMPT']} {world.rank} {socket.gethostname()}"
rng = np.random.default_rng(1)
x, y = rng.standard_normal((500, 20), np.float32), rng.integers(0, 4, 500)


class Slow(data.ArrayDataset):
    def take(self, indices):
        os.write(log, f"{where} {trainer.replica.steps} {time.time()}\\n".encode())
        time.sleep(0.02)
        return super().take(indices)


nn.seed(1)
model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optim.Adam(1e-3), microbatches=4, quiet=True, KEPT
)
trainer.fit(Slow(x, y), 10, 50, seed=2)
if world.rank == 0:
    print(world.size, repr(sum(float(abs(v).sum()) for v in model.state_dict().values())))
"""
KEPT = {"disk": 'checkpoint="run"', "memory": "elastic=True"}
ON_DISK = TRAIN.replace("KEPT", KEPT["disk"])
# Each rank writes as long as it may, whatever has become of the others: ATTEMPT RANK TIME.
WRITE = """
import os, time
import mpidl
from mpidl import supervised

world = mpidl.init()
attempt = int(os.environ["MPIDL_ATTEMPT"])
log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
open(f"pid-{attempt}-{world.rank}", "w").write(str(os.getpid()))
end = time.monotonic() + (1.5 if attempt else 60)
while time.monotonic() < end:
    time.sleep(0.05)
    supervised.check_lease()
    os.write(log, f"{attempt} {world.rank} {time.time()}\\n".encode())
"""


def start(hosts: Hosts, mpi: str, folder: Path, text: str, *options: str) -> subprocess.Popen[str]:
    """Start it on t0, with 2 ranks on each host."""
    where = ",".join(f"{name}:2" for name in hosts.names)
    line = [SCRIPT, "run", "t0", sys.executable, "-m", "mpidl", "run", "--restarts", "3"]
    line += ["--hosts", where, *options, job.script(folder, text)]
    settings = {"HOSTS_DIR": str(hosts.folder), "OPENBLAS_NUM_THREADS": "1"}
    return job.start(mpi, *line, cwd=folder, **settings)


def lines(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > end:
            process.send_signal(signal.SIGTERM)
            raise AssertionError(job.finish(process, 15))
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    line = (sys.executable, job.script(folder, ON_DISK))
    result = job.execute("openmpi", *line, cwd=folder, MPIDL_ATTEMPT="0")
    assert result.status == 0, result
    return result.output.split()[1]


soak = pytest.mark.soak


@pytest.mark.parametrize(
    ("mpi", "fault", "kept", "options"),
    [
        ("openmpi", "kill", "disk", []),
        ("mpich", "crash", "memory", []),
        pytest.param("mpich", "crash", "disk", [], marks=soak),
        pytest.param("mpich", "kill", "memory", [], marks=soak),
        pytest.param("openmpi", "crash", "disk", [], marks=soak),
        pytest.param("openmpi", "crash", "memory", ["--elastic"], marks=soak),
        pytest.param("openmpi", "cut", "memory", [], marks=soak),
        pytest.param("mpich", "cut", "disk", [], marks=soak),
    ],
    indirect=["mpi"],
)
def test_a_host_is_lost(
    mpi: str, fault: str, kept: str, options: list[str], expected: str, hosts: Up, tmp_path: Path
) -> None:
    two = hosts(2)
    process = start(two, mpi, tmp_path, TRAIN.replace("KEPT", KEPT[kept]), *options)
    wait_for(lambda: any(int(line[3]) > 20 for line in lines(tmp_path)), process, 40)
    begin = time.time()
    two.do(fault, "t1")
    wait_for(lambda: lines(tmp_path)[-1][0] == "1", process, 40)
    if fault == "cut":
        two.do("heal", "t1")
    result = two.finish(process, 60)
    assert result.status == 0, result
    size, total = result.output.split()[-2:]
    assert (int(size), total) == (4 if fault == "kill" else 2, expected), result
    # the first is noted before a step, and the step that follows is complete when another one is
    steps = sorted({int(line[3]) for line in lines(tmp_path) if line[0] == "1"})
    again = min(float(li[4]) for li in lines(tmp_path) if li[0] == "1" and int(li[3]) == steps[1])
    print(f"{mpi} {fault} {kept} {' '.join(options)}: {again - begin:.1f} s")
    assert again - begin < RECOVERY_SECONDS, result
    assert steps[0] >= (20 if kept == "disk" else 1), result


@pytest.mark.parametrize("mpi", ["mpich", pytest.param("openmpi", marks=soak)], indirect=True)
def test_two_halves_never_write_at_once(mpi: str, hosts: Up, tmp_path: Path) -> None:
    """One half is cut off, and comes back; a rank of it was stopped meanwhile."""
    two = hosts(2)
    process = start(two, mpi, tmp_path, WRITE)

    def written(attempt: int) -> set[str]:
        return {line[1] for line in lines(tmp_path) if line[0] == str(attempt)}

    wait_for(lambda: len(written(0)) == 4, process, 40)
    others = [int((tmp_path / f"pid-0-{rank}").read_text()) for rank in (2, 3)]
    os.kill(others[1], signal.SIGSTOP)
    two.do("cut", "t1")
    cut = time.time()
    wait_for(lambda: written(1), process, 40)
    assert not running(others[0])
    if running(others[1]):  # with MPICH nobody kills it there
        os.kill(others[1], signal.SIGCONT)
    two.do("heal", "t1")
    result = two.finish(process, 60)
    assert result.status == 0, result
    assert "t1 has been silent for 6 s" in result.errors, result
    assert written(1) == {"0", "1"}, result
    last = dict.fromkeys("0123", 0.0)
    for attempt, rank, at in lines(tmp_path):
        if attempt == "0":
            last[rank] = float(at)
    first = min(float(at) for attempt, _, at in lines(tmp_path) if attempt == "1")
    print(f"{mpi}: the other half ended after {last['2'] - cut:.1f} s, the next began after "
          f"{first - cut:.1f} s")  # fmt: skip
    assert max(last.values()) < first, result
    assert last["2"] - cut < 6 and last["3"] - cut < 1, result


@soak
def test_a_link_that_is_cut_for_a_moment_ends_nothing(hosts: Up, tmp_path: Path) -> None:
    two = hosts(2)
    process = start(two, "openmpi", tmp_path, ON_DISK)
    wait_for(lambda: len(lines(tmp_path)) > 50, process, 40)
    two.do("cut", "t1")
    time.sleep(2)
    two.do("heal", "t1")
    result = two.finish(process, 60)
    assert (result.status, result.errors) == (0, ""), result
    assert {line[0] for line in lines(tmp_path)} == {"0"}


@soak
def test_too_few_ranks_are_left(hosts: Up, tmp_path: Path) -> None:
    two = hosts(2)
    process = start(two, "mpich", tmp_path, ON_DISK, "--min-ranks", "3")
    wait_for(lambda: len(lines(tmp_path)) > 50, process, 40)
    two.do("crash", "t1")
    result = two.finish(process, 60)
    assert result.status == 1, result
    assert "given up: 2 ranks are left, and --min-ranks is 3\n" in result.errors, result
