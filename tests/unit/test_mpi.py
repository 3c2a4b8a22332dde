"""What is known of MPI libraries, without starting one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpidl import mpi
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
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "MPIDL_CUDA_AWARE"):
        monkeypatch.delenv(name, raising=False)


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
    stand_in = MPI(seen)
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


@pytest.mark.parametrize("value", ["yes", "no"])
def test_the_user_overrules_the_library(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", value)
    monkeypatch.setattr(mpi, "load", lambda: pytest.fail("the library was asked"))
    assert mpi.cuda_aware() == value


def test_a_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", "maybe")
    with pytest.raises(InvalidArgument, match="expected one of auto, yes, no"):
        mpi.cuda_aware()


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
    assert mpi.cuda_aware() == expected
