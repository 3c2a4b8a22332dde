"""What each vendor's launcher is told, and where it is looked for. The launchers are stand-ins."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mpidl import cores
from mpidl.cli import launcher
from mpidl.cli.app import app
from mpidl.errors import InvalidArgument, MPINotFound

if TYPE_CHECKING:
    from pathlib import Path

VENDORS = list(launcher.NAMES)
CORES = 4
SCHEDULERS = ("SLURM_", "PBS_", "LSB_", "FLUX_", "NCPUS")


def library(vendor: str, start: str | None = "/opt/bin/mpiexec") -> launcher.Library:
    return launcher.Library(vendor, f"{vendor} 1.0", "/opt/lib/libmpi.so", start)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, nobody's settings, not root, and no terminal."""
    for name in set(os.environ):
        if name.startswith(("OMPI_", "OMP_", "MPIDL_", "PYTHONUNBUFFERED", *SCHEDULERS)):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.mark.parametrize("vendor", VENDORS)
def test_options(vendor: str) -> None:
    line = launcher.options(library(vendor), 3)
    assert line[:3] == ["/opt/bin/mpiexec", "-n", "3"]
    rest = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if vendor == "openmpi" else []
    assert line[3:] == rest


@pytest.mark.parametrize(("ranks", "threads"), [(1, "4"), (2, "2"), (3, "1"), (4, "1"), (9, "1")])
@pytest.mark.parametrize("vendor", VENDORS)
def test_ranks_share_the_cores(vendor: str, ranks: int, threads: str) -> None:
    added = launcher.environment(library(vendor), ranks)
    assert added["OMP_NUM_THREADS"] == threads
    assert added["PYTHONUNBUFFERED"] == "1"
    assert "MPIDL_TERMINAL" not in added
    assert (added.get("OMPI_MCA_mpi_yield_when_idle") == "1") == (
        vendor == "openmpi" and ranks >= CORES
    )


@pytest.mark.parametrize("vendor", VENDORS)
def test_only_open_mpi_gets_its_own_settings(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    added = launcher.environment(library(vendor), CORES + 1)
    own = {name: value for name, value in added.items() if name.startswith("OMPI_")}
    expected = {
        "OMPI_MCA_btl": "^ofi",
        "OMPI_MCA_osc": "^ucx",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    assert own == (expected if vendor == "openmpi" else {})
    there = launcher.environment(library(vendor), 2, {"a": CORES + 1, "b": 1})
    assert "OMPI_MCA_btl" not in there
    assert ("OMPI_MCA_mpi_yield_when_idle" in there) == (vendor == "openmpi")


@pytest.mark.parametrize("vendor", VENDORS)
def test_settings_of_the_user_are_left_alone(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda _: True})())
    added = launcher.environment(library(vendor), CORES + 1)
    assert "MPIDL_TERMINAL" in added
    for name in added:
        monkeypatch.setenv(name, "mine" if name != "OMPI_MCA_osc" else "")  # also an empty one
    assert launcher.environment(library(vendor), CORES + 1) == {}


@pytest.mark.parametrize(
    ("threads", "ncpus", "machine", "expected"),
    [
        (8, 8, 8, "2"),  # PBS's: all of the host's cores, for each of 4 ranks
        (2, 2, 8, None),  # of "ompthreads=2": they fit
        (4, 8, 8, None),  # the user's, who may know
        (8, 8, 64, None),  # they fit
    ],
)
def test_what_pbs_has_set_is_changed_where_it_is_too_much(
    threads: int, ncpus: int, machine: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "available", lambda: machine)
    for name, value in (("PBS_JOBID", "1"), ("NCPUS", ncpus), ("OMP_NUM_THREADS", threads)):
        monkeypatch.setenv(name, str(value))
    added = launcher.environment(library("mpich"), 8, {"a": 4, "b": 4}, min(ncpus, machine))
    assert added.get("OMP_NUM_THREADS") == expected
    alone = launcher.environment(library("mpich"), 2, {"a": 1, "b": 1}, min(ncpus, machine))
    assert "OMP_NUM_THREADS" not in alone


def test_a_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    python = [sys.executable, "-m", "mpi4py", str(script), "--lr", "1"]
    assert launcher.program([str(script), "--lr", "1"], module=False) == python
    module = [sys.executable, "-m", "mpi4py", "-m", "train", "--lr", "1"]
    assert launcher.program(["train", "--lr", "1"], module=True) == module
    (shell,) = launcher.program(["sh"], module=False)
    assert os.access(shell, os.X_OK)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/train.py", "no such script: no/train.py"), ("no-such", "no such program: no-such")],
)
def test_a_program_that_is_not_there(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        launcher.program([name], module=False)
    monkeypatch.setattr(launcher, "find", lambda: library("mpich"))
    result = CliRunner().invoke(app, ["run", name])
    assert result.exit_code == 2
    assert result.stderr.split() == f"mpidl: {message}".split()


def test_dry_run_shows_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find", lambda: library("mpich"))
    script = tmp_path / "a b.py"
    script.touch()
    told = ["--launcher-args", "--hosts 'x y'", "--quiet", "--dry-run"]
    arguments = ["run", "-n", "2", *told, str(script)]
    result = CliRunner().invoke(app, [*arguments, "-n", "5"])
    assert result.exit_code == 0
    assert result.stdout == (
        "env OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1 MPIDL_QUIET=1 /opt/bin/mpiexec -n 2 "
        f"--hosts 'x y' {sys.executable} -m mpi4py '{script}' -n 5\n"
    )


def executable(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_launcher_beside_the_library_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = executable(tmp_path / "other/bin/mpirun", "mpirun (Open MPI) 4.1")
    own = executable(tmp_path / "own/bin/mpirun", "mpirun (Open MPI) 5.0")
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    assert launcher._launcher("openmpi", str(tmp_path / "own/lib/libmpi.so.40")) == str(own)
    assert launcher._launcher("openmpi", None) == str(other)


WRONG, RIGHT = "mpiexec (OpenRTE) 4.1 of Open MPI", "HYDRA build details:"


def test_a_launcher_of_another_mpi_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "mpiexec", WRONG)
    right = executable(tmp_path / "mpiexec.hydra", RIGHT)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launcher._launcher("mpich", None) == str(right)
    right.unlink()
    assert launcher._launcher("mpich", None) is None


def test_a_launcher_is_found_behind_one_of_another_mpi_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = executable(tmp_path / "a/mpiexec", WRONG)
    right = executable(tmp_path / "b/mpiexec", RIGHT)
    monkeypatch.setenv("PATH", f"{wrong.parent}:{right.parent}:/usr/bin:/bin")
    assert launcher._launcher("mpich", None) == str(right)


def test_a_library_without_a_launcher_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "query", lambda: library("mpich", None))
    message = r"found mpich 1\.0 in /opt/lib/libmpi\.so, but none of its launchers \(mpiexec, "
    with pytest.raises(MPINotFound, match=message):
        launcher.find()


def test_a_child_job_sees_nothing_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PRTE_X", "HYDRA_X"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_x", "1")  # the user's
    left = launcher.clean_environment()
    assert {n for n in left if n.startswith(("OMPI_", "PMI", "PRTE_", "HYDRA_"))} == {"OMPI_MCA_x"}
    assert left["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("", 8)]
)
def test_cores_are_those_of_the_affinity_and_the_container(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("mpidl.cores.CGROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert cores.available() == expected


def test_an_option_of_the_launcher_is_told_apart() -> None:
    with pytest.raises(InvalidArgument, match="--launcher-args '--oversubscribe'"):
        launcher.program(["--oversubscribe", "x.py"], module=False)


def test_np_is_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find", lambda: library("mpich"))
    result = CliRunner().invoke(app, ["run", "-np", "3", "--dry-run", "sh"])
    assert "-n 3 " in result.stdout
