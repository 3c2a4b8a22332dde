"""What is known of MPI libraries, without starting one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpidl import config, launched, mpi
from mpidl.errors import InvalidArgument, LauncherMismatch

VERSIONS = {  # what MPI_Get_library_version says, and the vendor
    "Open MPI v5.0.8, package: Open MPI root@x Distribution, ident: 5.0.8, repo rev: v5": "openmpi",
    "Open MPI v4.1.6, package: Debian OpenMPI, built with intel, ident: 4.1.6": "openmpi",
    "MPICH Version:      4.3.2\nMPICH Release date: Mon Oct 6 2025\nMPICH ABI: 17:2:5": "mpich",
    "MPICH Version:\t3.4a2\nMPICH Release date:\tunreleased development copy\n"
    "MPICH Device:\tch4:ofi\nMPICH CC:\t/opt/intel/icc -O2\0": "mpich",
    "Intel(R) MPI Library 2021.13 for Linux* OS\n": "intel",
    "MVAPICH2 Version      :\t2.3.7\nMVAPICH2 Release date : Wed March 02": "mpich",
    "MVAPICH Version      :\t3.0\nMVAPICH Release date : 04/10/2023": "mpich",
    "MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)\nMPI BUILD INFO": "mpich",
    "Microsoft MPI 10.1.12498.18": "unknown",
    "": "unknown",
}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v[:20].split("\n")[0] or "empty")
def test_vendor(version: str) -> None:
    assert mpi.vendor(version) == VERSIONS[version]


class MPI:
    """Stands in for mpi4py.MPI in a world of `size` ranks."""

    def __init__(self, size: int, version: str = "Open MPI  v5.0.8, package: x") -> None:
        self.COMM_WORLD = SimpleNamespace(size=size)
        self.version = version
        self.started = 0

    def Is_initialized(self) -> bool:
        return self.started > 0

    def Init_thread(self) -> None:
        self.started += 1

    def Get_library_version(self) -> str:
        return self.version


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_launchers = ("OMPI_COMM_", "PMI", "SLURM_", "FLUX_", "JSM_", "PALS_", "ALPS_", "MPI_LOCAL")
    for name in list(os.environ):
        if name.startswith((*of_launchers, "MPIDL_CUDA_AWARE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.parametrize(
    ("launched", "seen"),
    [(None, 1), ("1", 1), ("4", 4), ("4", 2)],
    ids=["alone", "one rank", "as launched", "others, but not alone"],
)
def test_ranks_that_see_each_other_pass(
    launched: str | None, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        monkeypatch.setenv("PMI_SIZE", launched)
    stand_in = MPI(seen, "MPICH Version:      4.3.2")
    mpi.start(stand_in)
    mpi.start(stand_in)
    assert stand_in.started == 1


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("Open MPI  v5.0.8, package: x", r"Open MPI v5\.0\.8"),
        ("MPICH Version:      4.3.2\nMPICH Release date: x", r"MPICH Version: 4\.3\.2"),
    ],
)
def test_ranks_that_each_believe_to_be_alone_are_told_why(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    message = rf"started 4 ranks \(PMI_SIZE=4\), but each .* loaded \({name}\)\. .*run -n 4 SCRIPT"
    with pytest.raises(LauncherMismatch, match=message):
        mpi.start(MPI(1, version))


def test_mpich_is_not_started_by_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process, with a message that helps nobody."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    stand_in = MPI(4, "MPICH Version:      4.3.2")
    with pytest.raises(LauncherMismatch, match=r"OMPI_COMM_WORLD_SIZE=4.*MPICH Version: 4\.3\.2"):
        mpi.start(stand_in)
    assert stand_in.started == 0


OPEN_MPI, MPICH = (
    "Open MPI  v5.0.11, package: x",
    "MPICH Version:      5.0.2\nMPICH Release date: x",
)
WITHOUT_PMIX = f"{MPICH}\nMPICH configure:    --with-pm=hydra"
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
PMI2 = {"PMI_FD": "5", "PMI_SIZE": "4", "PMI_RANK": "3"}
PMIX = {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1.0"}


@pytest.mark.parametrize(
    ("environment", "version", "by", "flag"),
    [
        (SRUN, OPEN_MPI, "srun", "srun --mpi=pmix, or use the launcher"),
        (SRUN | PMI2, OPEN_MPI, "srun", "srun --mpi=pmix, or"),
        (SRUN, MPICH, "srun", "srun --mpi=pmi2, or"),
        (SRUN, "Intel(R) MPI Library 2021.13", "srun", "I_MPI_PMI_LIBRARY=.* srun --mpi=pmi2, or"),
        (SRUN, "Microsoft MPI 10.1", "srun", "srun --mpi=pmix .Open MPI. or --mpi=pmi2"),
        (SRUN | PMIX, WITHOUT_PMIX, "srun", "srun --mpi=pmi2, or"),
        ({"FLUX_JOB_SIZE": "4", **PMI2}, OPEN_MPI, "flux run", "flux run -o pmi=pmix, or"),
        ({"FLUX_JOB_SIZE": "4"}, MPICH, "flux run", "flux run -o pmi=simple, or"),
        (
            {"JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "0"},
            MPICH,
            "jsrun",
            "Use the launcher",
        ),
        ({"PALS_RANKID": "3"}, OPEN_MPI, "PALS", "mpiexec --pmi=pmix, or"),
        ({"ALPS_APP_PE": "3"}, MPICH, "aprun", "Use the launcher"),
        (
            {"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", **SRUN},
            OPEN_MPI,
            "mpiexec",
            "Use the launcher",
        ),
    ],
)
def test_ranks_without_each_other_are_told_the_flag(
    environment: dict[str, str],
    version: str,
    by: str,
    flag: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LauncherMismatch, match=f"^{by} started 4 ranks .*{flag}") as caught:
        mpi.start(MPI(1, version))
    library = mpi.short_version(version)
    assert f"({library}). " in str(caught.value)


def test_nothing_is_started_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH would end the process, and Open MPI 5 leave its memory behind."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    for version, offered in ((OPEN_MPI, {}), (OPEN_MPI, PMI2), (WITHOUT_PMIX, PMIX)):
        stand_in = MPI(4, version)
        with monkeypatch.context() as context:
            for name, value in offered.items():
                context.setenv(name, value)
            with pytest.raises(LauncherMismatch):
                mpi.start(stand_in)
        assert stand_in.started == 0
    for version, offered in ((OPEN_MPI, PMIX), (MPICH, PMIX), (WITHOUT_PMIX, PMIX | PMI2)):
        stand_in = MPI(4, version)
        with monkeypatch.context() as context:
            for name, value in offered.items():
                context.setenv(name, value)
            mpi.start(stand_in)
        assert stand_in.started == 1


LISTED = """MPI plugin types are...
\tpmix
\tnone
\tpmi2
specific pmix plugin versions available: pmix_v4
"""
OLD = "srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: openmpi\n"


@pytest.mark.parametrize(
    ("listed", "found"),
    [(LISTED, ["pmi2", "pmix", "pmix_v4"]), (OLD, ["openmpi", "pmi2"]), ("", [])],
)
def test_rank_0_tells_what_srun_has(
    listed: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text(
        f"#!/bin/sh\n[ $1 = --mpi=list ] && echo asked >> {tmp_path}/log\nprintf '{listed}' >&2\n"
    )
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    offer = f" (this SLURM has {', '.join(found)})" if found else ""
    for rank in "012":
        monkeypatch.setenv("SLURM_PROCID", rank)
        with pytest.raises(LauncherMismatch) as caught:
            mpi.start(MPI(1, MPICH))
        told = f"srun --mpi=pmi2{offer if rank == '0' else ''}, or use"
        assert told in str(caught.value)
    assert (tmp_path / "log").read_text() == "asked\n"


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (SimpleNamespace(MPIX_Query_cuda_support=lambda: 1), "yes"),
        (SimpleNamespace(MPIX_Query_cuda_support=lambda: 0), "no"),
        (SimpleNamespace(), "unknown"),
    ],
    ids=["yes", "no", "no such function"],
)
def test_the_library_is_asked(library, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "load", lambda: SimpleNamespace(__file__="/opt/MPI.so"))
    monkeypatch.setattr(mpi.ctypes, "CDLL", {"/opt/MPI.so": library}.__getitem__)
    assert mpi.says_cuda_aware() == expected


@pytest.mark.parametrize(
    ("environment", "number"),
    [(SRUN, "3"), (SRUN | PMI2, "3"), (SRUN | PMIX, "3"), ({"OMPI_COMM_WORLD_RANK": "5"}, "5")],
)
@pytest.mark.parametrize("version", [OPEN_MPI, MPICH, WITHOUT_PMIX])
def test_each_trains_alone_where_that_is_wanted(
    environment: dict[str, str], number: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPI finds no launcher then, and each has a folder of its own in that of the job."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launched, "_number", None)
    monkeypatch.setenv("MPIDL_OUT", "/runs/sweep")
    assert config.out() == "/runs/sweep"
    monkeypatch.setenv("MPIDL_ALONE", "1")
    stand_in = MPI(1, version)
    mpi.start(stand_in)
    mpi.start(stand_in)
    assert stand_in.started == 1
    left = [name for name in environment if name in os.environ]
    assert all(name.startswith("SLURM_") for name in left)
    assert config.out() == f"/runs/sweep/{number}"
    assert not launched.found()


def test_who_is_not_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "_number", None)
    monkeypatch.setenv("MPIDL_ALONE", "1")
    with pytest.raises(InvalidArgument, match=r"^MPIDL_ALONE=1, but Open MPI v5\.0\.11 has .* 4 "):
        mpi.start(MPI(4, OPEN_MPI))
    monkeypatch.setenv("MPIDL_ALONE", "yes")
    with pytest.raises(InvalidArgument, match="MPIDL_ALONE='yes': expected one of 0, 1"):
        mpi.start(MPI(1, OPEN_MPI))


def test_the_error_names_the_way_to_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LauncherMismatch, match=r"If each is to train by itself, set MPIDL_ALONE=1"):
        mpi.start(MPI(1, MPICH))
