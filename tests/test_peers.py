"""Starts the bodies in tests/peers, mpidl with other frameworks, on 1 to 4 ranks."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import job
from tests.conftest import ALL
from tests.test_ranks import command_of

FOLDER = Path(__file__).parent / "peers"
#: What one process can import together, and the backend of Keras there.
FRAMEWORKS = {
    "torch": ("torch_*", ""),
    "jax": ("jax*", ""),
    "keras on torch": ("keras", "torch"),
    "keras on jax": ("keras", "jax"),
    "horovod": ("horovod", ""),
    "tensorflow": ("tensorflow", ""),
    "keras on tensorflow": ("keras", "tensorflow"),
}
USUAL = {
    ("openmpi", 1): ("torch",),
    ("openmpi", 2): ("torch", "jax", "keras on torch", "keras on jax", "horovod"),
    ("openmpi", 3): ("torch",),
    ("mpich", 2): ("jax",),  # what passes through MPI is the engine's, with any framework
}


def cases() -> list[tuple[str, int, str]]:
    if ALL:
        every = [(mpi, n) for mpi in ("openmpi", "mpich") for n in (1, 2, 3, 4)]
        return [(*on, name) for on in every for name in FRAMEWORKS]
    return [(*on, name) for on, names in USUAL.items() for name in names]


@pytest.mark.parametrize(("mpi_of_case", "ranks", "framework"), cases())
def test_with_others(mpi_of_case: str, ranks: int, framework: str, tmp_path: Path) -> None:
    pattern, backend = FRAMEWORKS[framework]
    module = framework.split()[-1]
    if framework != "horovod" and find_spec(module) is None:  # bodies tell how it is missed, too
        pytest.skip(f"{module} is not installed: see docs/frameworks.md")
    if framework == "horovod" and mpi_of_case == "mpich":
        pytest.skip("it is built for one MPI, here Open MPI")
    files = sorted(str(file) for file in FOLDER.glob(f"test_{pattern}.py"))
    assert files
    settings = {"MPIDL_TEST_RANKS": "1", "MPIDL_TEST_DEVICE": "cpu"}
    settings |= {"KERAS_BACKEND": backend} if backend else {}
    result = job.run(
        mpi_of_case,
        ranks,
        sys.executable,
        *command_of(files),
        timeout=280,
        MPIDL_TEST_TMP=str(tmp_path),
        **settings,
    )
    if result.status:
        pytest.fail(str(result), pytrace=False)
