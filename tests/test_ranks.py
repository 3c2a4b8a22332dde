"""Starts the bodies in tests/ranks on 1 to 4 ranks, under each MPI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import job

COUNTED = 3  # ranks, whose lines are counted: most bodies run on them


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_in_ranks(mpi: str, ranks: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if ranks != COUNTED:
        request.getfixturevalue("uncounted")
    result = run_bodies(mpi, ranks, "cpu", tmp_path)
    if result.status:
        pytest.fail(str(result), pytrace=False)


@pytest.mark.parametrize(
    ("mpi", "ranks", "cuda_aware"),
    [("openmpi", 3, "no"), ("openmpi", 3, "yes"), ("mpich", 1, "no")],
)
def test_on_the_stand_in_for_cupy(mpi: str, ranks: int, cuda_aware: str, tmp_path: Path) -> None:
    """A mock, for the paths of GPU arrays; tests/gpu has the real thing."""
    result = run_bodies(mpi, ranks, "stand-in", tmp_path, MPIDL_CUDA_AWARE=cuda_aware)
    if result.status:
        pytest.fail(str(result), pytrace=False)


def run_bodies(mpi: str, ranks: int, device: str, folder: Path, **extra: str) -> job.Result:
    # -m mpi4py and -x: the first failure on any rank ends all ranks at once
    pytest_line = (
        "-m",
        "pytest",
        "-x",
        "-q",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "tests/ranks",
    )
    command = (sys.executable, "-m", "mpi4py", *pytest_line)
    settings = {"MPIDL_TEST_RANKS": "1", "MPIDL_TEST_DEVICE": device, "MPIDL_TEST_TMP": str(folder)}
    return job.run(mpi, ranks, *command, timeout=280, **settings, **extra)
