"""The loader in whole jobs: scripts of every kind, ranks that are killed, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import job
from tests.jobs.test_interrupt import kill_what_is_left, running

SECONDS = 60.0  # until nothing is left; a worker takes far less, but the machine may be busy
WORKERS = 2

# No `if __name__ == "__main__"`, and all that a transform may use from its script.
SCRIPT = """
from __future__ import annotations

import functools
import os
import xml.dom
import numpy as np
import mpidl
from dataclasses import dataclass
from mpidl import data

world = mpidl.init()
print(f"rank {world.rank} runs the script\\n", end="")
SHIFT = 1
SHIFT += 1
TABLE = {}
TABLE["factor"] = 10


class Base:
    def __len__(self) -> int:
        return 24


@dataclass
class Squares(Base):
    folder: str
    scale: Scale

    def take(self, indices: np.ndarray) -> tuple:
        return super().__getattribute__("scale")(indices), indices


@dataclass(frozen=True)
class Scale:
    by: Unknown

    def __call__(self, x): return x * self.by


TWICE = Scale(2)


class Same:
    def __call__(self, x): return x


SAME = Same()

if SHIFT:
    @functools.cache
    def offset() -> int:
        return SHIFT


def transform(x, y, rng):
    world = offset()  # not the script's
    assert xml.dom.Node
    return TWICE(SAME(x)) * TABLE["factor"] + world, [y][0]


with data.Loader(Squares(".", Scale(3)), 8, world=world, workers=2, transform=transform) as loader:
    for epoch in range(2):
        for x, y in loader:
            assert (x == y * 60 + 2).all()
            assert len(y) == 8 // world.size
print(f"rank {world.rank} is done\\n", end="")
"""

HOLD = """
import os, pathlib, sys, time
import numpy as np
import mpidl
from mpidl import data

world = mpidl.init()

class Slow:
    def __len__(self):
        return 1000

    def take(self, indices):
        mine = pathlib.Path(f"{os.getpid()}.tmp")
        mine.touch()
        mine.rename(f"{os.getpid()}.pid")
        busy()
        return indices, indices

def busy():
    WAIT

loader = data.Loader(Slow(), world.size, world=world, workers=2)
pathlib.Path(f"{os.getpid()}.rank").touch()
for _ in loader:
    time.sleep(0.01)
"""
WAITS = {"asleep": "time.sleep(300)", "at_work": "while True: pass", "quick": "pass"}


def wait_for_files(folder: Path, kind: str, count: int) -> list[int]:
    """Return the processes that left a file."""
    end = time.monotonic() + SECONDS
    while len(files := list(folder.glob(f"*.{kind}"))) < count:
        assert time.monotonic() < end, f"no {count} files *.{kind}"
        time.sleep(0.02)
    return [int(file.stem) for file in files]


def wait_until_gone(processes: list[int]) -> list[int]:
    end = time.monotonic() + SECONDS
    while any(map(running, processes)) and time.monotonic() < end:
        time.sleep(0.02)
    return kill_what_is_left(processes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_script_is_run_once_by_each_rank(mpi: str, ranks: int, tmp_path: Path) -> None:
    result = job.run(mpi, ranks, job.script(tmp_path, SCRIPT))
    assert result.status == 0, result
    lines = [
        f"rank {rank} {what}" for rank in range(ranks) for what in ("runs the script", "is done")
    ]
    assert sorted(result.output.split("\n")[:-1]) == sorted(lines), result
    assert not result.errors, result


def test_a_script_without_mpidl_run(tmp_path: Path) -> None:
    result = job.execute(None, sys.executable, job.script(tmp_path, SCRIPT))
    assert result.status == 0, result
    assert result.output.count("runs the script") == 1, result


REFUSED = {
    "def f(x, y, rng): return x, y\nold = f\ndef f(*a): return old(*a)": "more than once",
    "def f(x, y, rng): return x, y\nf.__qualname__ = 'g'; g = f": "not by def or class",
    "f = lambda x, y, rng: (x, y)": "the transform cannot be sent",
}


@pytest.mark.parametrize("text", REFUSED)
def test_definitions_that_workers_cannot_be_sure_of(text: str, tmp_path: Path) -> None:
    script = f"""
from mpidl import data
{text}
data.Loader(data.digits()[0], 8, world=None, transform=f)
"""
    result = job.execute(None, sys.executable, job.script(tmp_path, script))
    assert result.status == 1, result
    assert "InvalidArgument: Loader: " in result.errors, result
    assert REFUSED[text] in result.errors, result
    assert "workers=0" in result.errors, result


def test_definitions_without_a_file() -> None:
    script = (
        "from mpidl import data\ndef f(x, y, rng): return x, y\n"
        "data.Loader(data.digits()[0], 8, world=None, transform=f)"
    )
    result = job.execute(None, sys.executable, "-c", script)
    assert "f is defined in __main__, which has no source file" in result.errors, result


def test_a_variable_that_cannot_be_sent(mpi: str, tmp_path: Path) -> None:
    script = """
import mpidl
from mpidl import data

world = mpidl.init()

def f(x, y, rng):
    return x * world.rank, y

list(data.Loader(data.digits()[0], 8, world=world, transform=f))
"""
    result = job.run(mpi, 2, job.script(tmp_path, script))
    assert result.status != 0, result
    assert "(`world` of the script could not be sent to the workers: " in result.errors, result
    assert "\nNameError: name 'world' is not defined" in result.errors, result


def test_a_module_that_starts_mpi(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import mpidl\nworld = mpidl.init()\ndef f(x, y, rng): return x, y\n"
    )
    script = "import mine\nfrom mpidl import data\n"
    script += "list(data.Loader(data.digits()[0], 8, world=mine.world, transform=mine.f))\n"
    result = job.execute(None, sys.executable, job.script(tmp_path, script))
    assert result.status != 0, result
    assert "no rank and starts no MPI" in result.errors, result
    assert "failed while it was set up" in result.errors, result


def test_an_error_in_a_worker_ends_the_job_and_is_told(mpi: str, tmp_path: Path) -> None:
    script = """
import mpidl
from mpidl import data

def f(x, y, rng):
    raise ValueError("a broken " + "leaf")

world = mpidl.init()
if world.rank == 1:
    list(data.Loader(data.digits()[0], 8, world=None, transform=f))
world.barrier()
"""
    result = job.run(mpi, 2, job.script(tmp_path, script), timeout=30)
    assert result.status != 0, result
    assert result.errors.count("mpidl: rank 1 of 2 on ") == 1, result
    assert "of the loader failed in epoch 0, batch 0:" in result.errors, result
    assert result.errors.count("ValueError: a broken leaf\n") == 2, result  # of worker and rank
    assert 'raise ValueError("a broken " + "leaf")' in result.errors, result


@pytest.mark.parametrize("wait", ["asleep", "at_work"])
def test_workers_go_with_a_rank_that_is_killed(mpi: str, wait: str, tmp_path: Path) -> None:
    """One rank, without a launcher: nobody else cleans up."""
    text = HOLD.replace("WAIT", WAITS[wait])
    process = job.start(mpi, sys.executable, job.script(tmp_path, text), cwd=tmp_path)
    workers: list[int] = []
    try:
        workers = wait_for_files(tmp_path, "pid", WORKERS)
        assert all(map(running, workers))
        files = [
            str(f.readlink())
            for pid in (*workers, process.pid)
            for f in Path(f"/proc/{pid}/fd").iterdir()
        ]
        assert len([f for f in files if f.startswith("/memfd:mpidl-slot")]) == 4 * WORKERS
        assert not [f for f in files if f.startswith("/dev/shm/mpidl")]
        process.kill()
    finally:
        left = wait_until_gone([*workers, process.pid])
        result = job.finish(process, timeout=SECONDS)
    assert not left, result
    assert not result.errors, result


@pytest.mark.parametrize("wait", ["asleep", "quick"])
def test_ctrl_c_ends_workers_without_a_word(mpi: str, wait: str, tmp_path: Path) -> None:
    line = (sys.executable, "-m", "mpidl", "run", "-n", "2")
    text = HOLD.replace("WAIT", WAITS[wait])
    process = job.start(mpi, *line, job.script(tmp_path, text), cwd=tmp_path)
    processes: list[int] = []
    try:
        processes = wait_for_files(tmp_path, "pid", 2 * WORKERS)
        processes += wait_for_files(tmp_path, "rank", 2)
        os.killpg(process.pid, signal.SIGINT)
    finally:
        left = wait_until_gone(processes)
        result = job.finish(process, timeout=SECONDS)
    assert not left, result
    assert result.status != 0, result
    assert "Traceback" not in result.output + result.errors, result


def test_ctrl_c_while_workers_start(mpi: str, tmp_path: Path) -> None:
    """They take no notice from their first moment, long before Python runs anything in them."""
    text = HOLD.replace("WAIT", WAITS["asleep"]).replace(
        "for _ in loader", "import signal\nloader._start()\n"
        "for worker in loader._running: worker.process.send_signal(signal.SIGINT)\nfor _ in loader",
    )  # fmt: skip
    process = job.start(mpi, sys.executable, job.script(tmp_path, text), cwd=tmp_path)
    workers: list[int] = []
    try:
        workers = wait_for_files(tmp_path, "pid", WORKERS)
        assert all(map(running, workers))
        os.killpg(process.pid, signal.SIGINT)
    finally:
        left = wait_until_gone([*workers, process.pid])
        result = job.finish(process, timeout=SECONDS)
    assert not left, result
    assert "Traceback" not in result.errors, result
