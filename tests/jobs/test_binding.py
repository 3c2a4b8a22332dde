"""Where ranks are put by real launchers: cores, threads, and what is told of too few."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import job

SHOW = """
import os
import mpidl
world = mpidl.init()
mpidl.init()  # tells nothing again
cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
line = f"{world.rank} {cpus} {os.environ.get('OMP_NUM_THREADS')}"
if world.rank == 0:
    print(*sorted(world.comm.gather(line)), sep="\\n")
else:
    world.comm.gather(line)
"""
CPUS = sorted(os.sched_getaffinity(0))
ALL = ",".join(map(str, CPUS))
TELLS = {"MPIDL_OVERSUBSCRIBE": "0"}
needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two cores")


@needs_two
def test_cores_of_ones_own(mpi: str, tmp_path: Path) -> None:
    line = ("taskset", "-c", f"{CPUS[0]},{CPUS[1]}", sys.executable, "-m", "mpidl", "run", "-n")
    line += ("2", "--bind", "cores", job.script(tmp_path, SHOW))
    result = job.execute(mpi, *line, **TELLS)
    assert (result.status, result.errors) == (0, ""), result
    found = [row.split()[1] for row in result.output.splitlines()]
    assert sorted(found) == sorted(map(str, CPUS[:2])), result


def test_more_ranks_than_cores_are_told_once(mpi: str, tmp_path: Path) -> None:
    script = job.script(tmp_path, SHOW)
    line = ("taskset", "-c", str(CPUS[0]), sys.executable, "-m", "mpidl", "run", "-n", "2", script)
    result = job.execute(mpi, *line, **TELLS)
    assert result.status == 0, result
    assert result.output == f"0 {CPUS[0]} 1\n1 {CPUS[0]} 1\n", result
    (told,) = [row for row in result.errors.splitlines() if "BindingWarning" in row]
    assert " 2 ranks of " in told, result


def test_the_launcher_did_not_bind(tmp_path: Path) -> None:
    """MPICH's does not by default: ranks share the cores, and no threads more than those."""
    line = (str(job.LAUNCHERS["mpich"]), "-n", "2", sys.executable, job.script(tmp_path, SHOW))
    result = job.execute("mpich", *line, **TELLS, OPENBLAS_NUM_THREADS="")
    threads = max(1, len(CPUS) // 2)
    assert result.status == 0, result
    assert result.output == f"0 {ALL} {threads}\n1 {ALL} {threads}\n", result
    assert ("BindingWarning" in result.errors) == (len(CPUS) == 1), result
