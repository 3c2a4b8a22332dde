"""The bodies of tests/ranks on CuPy arrays: pytest -m gpu, on a machine with an NVIDIA GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests import job
from tests.conftest import MPI_LIBRARIES
from tests.test_ranks import run_bodies

pytestmark = pytest.mark.gpu


def gpus() -> int:
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if gpus() == 0:
        pytest.skip("needs an NVIDIA GPU and CuPy; docs/gpu.md says what has run on one")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_in_ranks(mpi: str, ranks: int, tmp_path: Path) -> None:
    result = run_bodies(mpi, ranks, "cuda", tmp_path, ())
    if result.status:
        pytest.fail(str(result), pytrace=False)


@pytest.mark.parametrize("strategy", ["allreduce", "ring", "parameter_server", "sharded"])
def test_digits(mpi: str, strategy: str) -> None:
    options = ("--device", "cuda", "--strategy", strategy, "--epochs", "12")
    result = job.run(mpi, 2, "examples/digits_mlp.py", *options)
    assert result.status == 0, result
    accuracy = float(result.output.split("test accuracy")[1].split("%")[0])
    assert accuracy > 95


def test_doctor_names_the_gpu() -> None:
    mpi = next(name for name, path in MPI_LIBRARIES.items() if path.exists())
    result = job.execute(mpi, "mpidl", "doctor", "--json")
    assert result.status == 0, result
    assert len(json.loads(result.output)["facts"]["gpus"]) == gpus()
