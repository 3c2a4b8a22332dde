"""`mpidl doctor`: one screen that tells the truth about this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from typing import Any

from tests import job
from tests.conftest import MPI_LIBRARIES

DOCTOR = (sys.executable, "-m", "mpidl", "doctor")
LINES, COLUMNS = 24, 80


def report(mpi: str, **extra: str) -> dict[str, Any]:
    result = job.execute(mpi, *DOCTOR, "--json", **extra)
    assert (result.status, result.errors) == (0, ""), result
    return json.loads(result.output)


def test_json(mpi: str) -> None:
    found = report(mpi)
    facts = found["facts"]
    assert found["healthy"] is True and found["problems"] == [], found
    assert facts["mpi"].startswith({"openmpi": "Open MPI v", "mpich": "MPICH"}[mpi]), found
    assert os.path.samefile(facts["mpi_library"], MPI_LIBRARIES[mpi])  # noqa: PTH121
    assert os.path.samefile(facts["launcher"], job.LAUNCHERS[mpi])  # noqa: PTH121
    assert facts["thread_level"] == "multiple", found
    assert facts["ranks_per_node"].startswith("2 of 2"), found
    assert facts["strategy"] == "hierarchical (one node, whose ranks share memory)", found
    assert 1 <= facts["cores"] <= len(os.sched_getaffinity(0)), found
    assert facts["inside"] == [], found
    assert facts["omp_num_threads"] is None, found
    assert facts["numpy"] == importlib.metadata.version("numpy"), found
    assert facts["mpi4py"] == importlib.metadata.version("mpi4py"), found
    assert facts["python"] == f"{platform.python_version()} ({sys.executable})", found
    assert facts["cuda_aware"].startswith("no (no GPU: "), found
    assert facts["says_cuda_aware"] in ("yes", "no", "nothing"), found


def test_what_the_environment_says_is_told() -> None:
    facts = report("openmpi", OMP_NUM_THREADS="5", SLURM_JOB_ID="7", MPIDL_CUDA_AWARE="yes")[
        "facts"
    ]
    assert (facts["omp_num_threads"], facts["inside"]) == ("5", ["SLURM_JOB_ID"])
    assert facts["cuda_aware"] == "yes (MPIDL_CUDA_AWARE=yes)"


def test_it_fits_one_screen(mpi: str) -> None:
    result = job.execute(mpi, *DOCTOR, COLUMNS=str(COLUMNS))
    assert (result.status, result.errors) == (0, ""), result
    rows = [part for line in result.output.splitlines() for part in textwrap.wrap(line, COLUMNS)]
    assert len(rows) < LINES, result  # the shell's next prompt takes one
    assert "\x1b" not in result.output, result  # no colours in a pipe
    assert result.output.splitlines()[-1].startswith("ready"), result
    found = {k: v.strip() for k, _, v in (line.strip().partition("  ") for line in rows)}
    assert found["launcher"] == str(job.LAUNCHERS[mpi]), result  # whole, to be copied
    assert found["thread level"] == "multiple", result


def test_ranks_that_fail_are_a_problem_and_not_a_traceback(mpi: str) -> None:
    result = job.execute(mpi, *DOCTOR, "--json", MPIDL_CUDA_AWARE="maybe")  # heeded by ranks only
    assert (result.status, result.errors) == (1, ""), result
    found = json.loads(result.output)
    assert found["healthy"] is False, result
    (problem,) = found["problems"]
    assert problem.startswith("two ranks failed (exit status 1):\n"), result
    assert "InvalidArgument: MPIDL_CUDA_AWARE='maybe': expected one of auto, yes, no" in problem
    assert len(problem.splitlines()) <= 9, result
