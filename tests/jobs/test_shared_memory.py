"""Whole jobs with `hierarchical`: what killed ranks leave, and where memory cannot be shared."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mpidl import shared
from tests import job
from tests.conftest import SHARED_MEMORY, maps_of

if TYPE_CHECKING:
    import numpy as np

RANKS = 2
MAPPED = "/memfd:mpidl"
OF_MPI = ("mpich_shm_", "sm_segment.", "vader_segment.")  # beginnings of its files' names

START = """
import os, sys
import numpy as np
import mpidl

world = mpidl.init()
rng = np.random.default_rng(int(sys.argv[2]))

def make():
    mpidl.nn.seed(1)
    return mpidl.nn.Linear(30, int(sys.argv[3]))

def step(model, x):
    mpidl.nn.mse(model(x), np.zeros((len(x), int(sys.argv[3])), np.float32)).backward()
"""

TRAIN = """
model, alone = make(), make()
replica = mpidl.DataParallel(model, mpidl.optim.SGD(lr=0.5), sys.argv[1])
for _ in range(3):
    x = rng.standard_normal((4 * world.size, 30)).astype(np.float32)
    step(model, np.split(x, world.size)[world.rank])
    replica.step()
    step(alone, x)
    for p in alone.parameters():
        p.data -= 0.5 * p.grad
        p.zero_grad()
for found, expected in zip(model.parameters(), alone.parameters()):
    np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=1e-6)
sys.stdout.write(f"{replica.choice.name}, {sum(b.param.nbytes for b in replica.buckets)} bytes\\n")
"""

TRAIN_FOR_EVER = """
replica = mpidl.DataParallel(model := make(), mpidl.optim.SGD(lr=0.5), sys.argv[1])
while True:
    step(model, rng.standard_normal((4, 30)).astype(np.float32))
    replica.step()
    if replica.steps == 3:
        open(f"{world.rank}.tmp", "w").write(str(os.getpid()))
        os.rename(f"{world.rank}.tmp", f"{world.rank}.pid")
"""

REFUSED = """
def refuse(*_):
    raise OSError(1, "Operation not permitted")

if world.rank == 0:
    os.memfd_create = refuse
"""

CHILD = """
import mmap, os, sys
from mpidl import shared

file = os.memfd_create("mpidl")
os.ftruncate(file, 1 << 20)
name = shared._name(file)
memory = shared._open(name, 1 << 20)
print(*name, flush=True)
sys.stdin.readline()
memory[-4:] = b"from"
print("written", flush=True)
sys.stdin.readline()
"""

# Between PID namespaces the MPI libraries cannot copy from one process to another either.
APART = {
    "openmpi": {"OMPI_MCA_btl": "self,tcp"},
    "mpich": {"MPIR_CVAR_CH4_CMA_ENABLE": "0"},
}
PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
MOUNTS = ("unshare", "--mount")


def need(*unshare: str) -> None:
    """Skip the test where this machine gives us no namespace of our own."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1)")
    trial = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if trial.returncode:
        pytest.skip(f"{' '.join(unshare)}: {trial.stderr.strip()}")


def seed(rng: np.random.Generator) -> str:
    return str(rng.integers(2**32))


def files_mapped_by(processes: list[int]) -> set[str]:
    """Return device and inode of the shared memory that these processes map."""
    lines = "".join(maps_of(Path(f"/proc/{p}")) for p in processes).splitlines()
    return {" ".join(line.split()[3:5]) for line in lines if MAPPED in line}


def wait_for(folder: Path) -> list[int]:
    end = time.monotonic() + 30
    while len(files := list(folder.glob("*.pid"))) < RANKS:
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def test_killed_ranks_leave_nothing(mpi: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """No file, and no memory: nobody maps theirs."""
    before = set(SHARED_MEMORY.iterdir())
    script = job.script(tmp_path, START + TRAIN_FOR_EVER)
    line = (sys.executable, "-m", "mpidl", "run", "-n", str(RANKS))
    arguments = ("hierarchical", seed(rng), "10000")
    process = job.start(mpi, *line, script, *arguments, cwd=tmp_path)
    ranks: list[int] = []
    try:
        ranks = wait_for(tmp_path)
        files = files_mapped_by(ranks)
        assert len(files) == 1  # of the one bucket
        assert len(files_mapped_by(ranks[:1])) == 1
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        result = job.finish(process, timeout=15)
    assert result.status != 0, result
    left = set(SHARED_MEMORY.iterdir()) - before
    assert not [file for file in left if not file.name.startswith(OF_MPI)]
    everyone = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]
    assert not files & files_mapped_by(everyone)


def test_memory_outlives_the_process_that_made_it() -> None:
    """As `kill -9` of one rank: the others read and write on."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            process, file, device, inode = map(int, child.stdout.readline().split())
            assert process == child.pid
            memory = shared._open((process, file, device, inode), 1 << 20)
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "written\n"
        finally:
            child.kill()
    assert bytes(memory[-4:]) == b"from"
    assert not any(memory[:-4])
    memory[:5] = b"still"
    assert bytes(memory[:5]) == b"still"


def test_the_size_of_dev_shm_is_no_limit(
    mpi: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Of 4 MiB, which MPI needs for itself: the job's arrays are larger."""
    need(*MOUNTS)
    tiny = ("sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh")
    script = job.script(tmp_path, START + TRAIN)
    line = (sys.executable, "-m", "mpidl", "run", "-n", str(RANKS))
    arguments = ("hierarchical", seed(rng), "100000")
    result = job.execute(mpi, *MOUNTS, *tiny, *line, script, *arguments)
    assert result.status == 0, result
    assert result.output.splitlines() == [f"hierarchical, {100_000 * 31 * 4} bytes"] * RANKS, result


@pytest.mark.parametrize("asked", ["hierarchical", "auto"])
def test_ranks_in_containers_of_their_own(
    mpi: str, asked: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """PID namespaces: no rank can name another's process. They train, with one warning."""
    need(*PROCESSES)
    script = job.script(tmp_path, START + TRAIN)
    command = (*PROCESSES, sys.executable, script, asked, seed(rng), "40")
    result = job.run(mpi, 3, *command, **APART[mpi])
    assert_trained_by_sharded(result, 3)
    assert "let all ranks of a node run as one user, in one container" in result.errors, result


@pytest.mark.parametrize("asked", ["hierarchical", "auto"])
def test_a_system_that_refuses(
    mpi: str, asked: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    script = job.script(tmp_path, START + REFUSED + TRAIN)
    result = job.run(mpi, RANKS, script, asked, seed(rng), "40")
    assert_trained_by_sharded(result, RANKS)
    assert re.search("hierarchical: rank 0: memfd_create: .*not permitted\n", result.errors), result


def assert_trained_by_sharded(result: job.Result, ranks: int) -> None:
    """With one warning of one line, and the line of the script that it is about."""
    assert result.status == 0, result
    names = [line.split(",")[0] for line in result.output.splitlines()]
    assert names == ["sharded"] * ranks, result
    told = r'script\.py:\d+: RuntimeWarning: strategy "sharded" in place of hierarchical: .+\n'
    assert re.search(told + "  replica = mpidl", result.errors), result
    assert result.errors.count("RuntimeWarning") == 1, result
