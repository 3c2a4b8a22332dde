"""Ranks that wait for others for ever are told of, with those they wait for, and the job ends."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest

from mpidl.watchdog import STATUS
from tests import job
from tests.jobs.test_failures import only_mpich

LIMIT = 0.5
OVER = f"mpidl: the job is ended, with exit status {STATUS}\n"

START = """
import os, signal, sys, threading, time
import numpy as np
import mpidl

world = mpidl.init()
world.barrier()

def come_late(seconds):
    time.sleep(seconds)

"""
WAIT = "world.sum([1, 2])\nprint('well', flush=True)\n"


def run(mpi: str, folder: Path, text: str, ranks: int = 3, **extra: str) -> job.Result:
    settings = {"MPIDL_STALL_SECONDS": str(LIMIT), **extra}
    return job.run(mpi, ranks, job.script(folder, START + text), timeout=30, **settings)


def assert_ended(result: job.Result, waiting: str, reports: int | None = 1) -> None:
    """By one rank's report, and not by the time limit of the test."""
    assert result.status != 0, result
    if "Open MPI" in result.errors:  # MPICH's launcher may give the status of those it has ended
        assert result.status == STATUS, result
    assert result.errors.count(OVER) == 1, result
    told = re.findall(r"mpidl: (ranks? [\d, ]+) ha(?:s|ve) waited for \d+ s\n", result.errors)
    assert set(told) == {waiting}, result
    assert reports is None or len(told) == reports, result
    assert "well" not in result.output, result


def line_of(text: str, part: str) -> int:
    return 1 + next(i for i, line in enumerate((START + text).splitlines()) if part in line)


def test_a_late_rank_is_named_with_its_stack_and_may_still_come(mpi: str, tmp_path: Path) -> None:
    text = "if world.rank == 1:\n    come_late(2.5)\n" + WAIT
    result = run(mpi, tmp_path, text, ranks=2, MPIDL_STALL="warn")
    assert (result.status, result.output.split()) == (0, ["well"] * 2), result
    path = tmp_path / "script.py"
    assert (
        f"  rank 0: in sum of 2 numbers at {path}:{line_of(text, 'sum')}, its call 2\n"
        f"  rank 1 on {platform.node()} (process "
    ) in result.errors, result
    assert (
        "): is elsewhere, after 1 calls\n"
        f"    {path}:{line_of(text, 'come_late(2')} in <module>: come_late(2.5)\n"
        f"    {path}:{line_of(text, 'time.sleep')} in come_late: time.sleep(seconds)\n"
        "  it goes on, as MPIDL_STALL=warn asks\n"
    ) in result.errors, result
    assert OVER not in result.errors, result


@pytest.mark.soak
def test_a_late_rank_that_does_not_come_ends_the_job(mpi: str, tmp_path: Path) -> None:
    result = run(mpi, tmp_path, "if world.rank == 1:\n    come_late(60)\n" + WAIT)
    assert_ended(result, "ranks 0, 2", reports=None)
    assert result.seconds > 10 * LIMIT, result


@pytest.mark.parametrize("culprit", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_a_stopped_rank_is_named(mpi: str, culprit: int, tmp_path: Path) -> None:
    """Also if it is the one that collects what the others say."""
    text = f"if world.rank == {culprit}:\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    result = run(mpi, tmp_path, text + WAIT)
    assert_ended(result, "ranks 1, 2" if culprit == 0 else "ranks 0, 1", reports=None)
    assert re.search(
        rf"\n  rank {culprit} on \S+ \(process \d+\): does not answer: it is stopped\n",
        result.errors,
    ), result


@pytest.mark.parametrize("leaves", ["sys.exit(0)", pytest.param("pass", marks=pytest.mark.soak)])
def test_a_rank_that_has_left_is_named(mpi: str, leaves: str, tmp_path: Path) -> None:
    text = f"if world.rank == 1:\n    {leaves}\nelse:\n    world.barrier()\n"
    result = run(mpi, tmp_path, text)
    assert_ended(result, "ranks 0, 2")
    assert re.search(r"rank 1 on .*: has come to the end of its script\n", result.errors), result


def test_system_exit_under_the_launcher_alone_ends_the_job(tmp_path: Path) -> None:
    """`mpidl run` would see it; plain mpirun does not, and neither does Python tell of it."""
    text = START + "if world.rank == 1:\n    raise SystemExit(3)\n" + WAIT
    line = (str(job.LAUNCHERS["openmpi"]), "--oversubscribe", "-n", "2", sys.executable)
    settings = {"MPIDL_STALL_SECONDS": str(LIMIT)}
    result = job.execute("openmpi", *line, job.script(tmp_path, text), timeout=30, **settings)
    assert_ended(result, "rank 0")


@pytest.mark.soak
def test_ranks_in_different_calls(mpi: str, tmp_path: Path) -> None:
    text = "if world.rank == 1:\n    world.broadcast(1)\nworld.barrier()\n"
    result = run(mpi, tmp_path, text)
    assert_ended(result, "ranks 0, 1, 2", reports=None)
    assert re.search(r"\n  ranks 0, 2: in barrier at .*, its call 2\n", result.errors), result
    assert re.search(r"\n  rank 1: in broadcast from rank 0 at .*, its call 2\n", result.errors)
    assert "MPIDL_CHECK=collectives tells" in result.errors, result


TRAINING = """
from mpidl import nn, optim
replica = mpidl.DataParallel(nn.Linear(3, 2), optim.SGD(lr=0.1), "hierarchical")
for step in range(9):
    if world.rank == 1 and step == 4:
        WHAT
    (replica.model(mpidl.tensor(np.ones((1, 3), np.float32))) ** 2).mean().backward()
    replica.step()
print("well")
"""


@only_mpich
def test_a_rank_that_makes_one_call_more_is_told_at_the_next_step(mpi: str, tmp_path: Path) -> None:
    """It meets another rank's call of another purpose, which MPI takes for the same."""
    result = run(mpi, tmp_path, TRAINING.replace("WHAT", "world.sum([1, 0, 0, 0, 0, 0])"), ranks=2)
    assert result.status != 0, result
    assert re.search(
        r"rank 0 of 2 on [^$]*RankMismatch: step 4: a rank has made more collective calls than "
        "others, or fewer: MPIDL_CHECK=collectives tells where they part\n",
        result.errors,
    ), result


@only_mpich
def test_calls_are_compared_where_asked(mpi: str, tmp_path: Path) -> None:
    text = TRAINING.replace("WHAT", "world.sum([1, 0, 0, 0, 0, 0])")
    result = run(mpi, tmp_path, text, ranks=2, MPIDL_CHECK="collectives", MPIDL_STALL_SECONDS="20")
    line = len(START.splitlines()) + 1
    assert result.status != 0, result
    assert result.errors.count("RankMismatch: the ranks make different calls: ") == 1, result
    assert re.search(
        rf"calls: rank 0: step 4 at \S+:{line + 7}; rank 1: sum of 6 numbers at \S+:{line + 5}\n",
        result.errors,
    ), result


@only_mpich
def test_a_rank_that_leaves_is_told_at_once_where_calls_are_compared(
    mpi: str, tmp_path: Path
) -> None:
    text = "if world.rank:\n    world.barrier()\n"
    result = run(mpi, tmp_path, text, ranks=2, MPIDL_CHECK="collectives", MPIDL_STALL_SECONDS="20")
    assert result.status != 0, result
    assert "rank 0: no more call at the end of the script; rank 1: barrier at" in result.errors


@only_mpich
@pytest.mark.soak
@pytest.mark.parametrize("why", ["off", "debugger", "work"])
def test_nothing_is_told_where_nothing_is_wrong(mpi: str, why: str, tmp_path: Path) -> None:
    """Switched off; a person looks at a rank; ranks compute, and call the others now and then."""
    text = "if world.rank == 1:\n    come_late(2)\n" + WAIT
    if why == "debugger":
        text = text.replace("come_late(2)", "import bdb; bdb.time = time; exec("
                            "compile('time.sleep(2)', 'b', 'exec'), vars(bdb))")  # fmt: skip
    if why == "work":
        text = "for _ in range(10):\n    time.sleep(0.2)\n    world.barrier()\n" + WAIT
    seconds = {"off": "0", "work": "1"}.get(why, str(LIMIT))
    result = run(mpi, tmp_path, text, ranks=2, MPIDL_STALL_SECONDS=seconds)
    assert (result.status, result.output.split()) == (0, ["well"] * 2), result
    assert not result.errors.strip(), result


@pytest.mark.parametrize(
    "end", ["world.MPI.Finalize()", "", "os._exit(0) if os.fork() == 0 else 0"]
)
def test_the_thread_is_no_trouble_at_the_end(mpi: str, end: str, tmp_path: Path) -> None:
    text = f"time.sleep(world.rank * 0.5)\n{end}\nsys.stdout.write('well\\n')\n"
    result = run(mpi, tmp_path, text, ranks=2, MPIDL_STALL_SECONDS="0.2")
    assert (result.status, result.output.split()) == (0, ["well"] * 2), result
    assert not result.errors.strip(), result
