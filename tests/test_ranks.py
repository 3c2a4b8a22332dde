"""Starts the bodies in tests/ranks on 1 to 4 ranks, under each MPI."""

from __future__ import annotations

import sys

import pytest

from tests import job


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_in_ranks(mpi: str, ranks: int) -> None:
    result = run_bodies(mpi, ranks, device="cpu")
    assert result.status == 0, result


def run_bodies(mpi: str, ranks: int, device: str) -> job.Result:
    # -m mpi4py and -x: the first failure on any rank ends all ranks at once
    pytest_line = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/ranks")
    command = (sys.executable, "-m", "mpi4py", *pytest_line)
    return job.run(
        mpi, ranks, *command, timeout=280, MPIDL_TEST_RANKS="1", MPIDL_TEST_DEVICE=device
    )
