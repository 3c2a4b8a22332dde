"""The examples for JAX and Keras, on 2 ranks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import examples_page, job

EXAMPLES = [
    ("jax_digits", "jax", ""),
    pytest.param("keras_digits", "keras", "torch", marks=pytest.mark.soak),
    pytest.param("keras_digits", "keras", "jax", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("name", "framework", "backend"), EXAMPLES)
def test_digits_are_read(name: str, framework: str, backend: str, tmp_path: Path) -> None:
    if find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    settings = {"KERAS_BACKEND": backend} if backend else {}
    line = ("openmpi", 2, f"examples/{name}.py")
    result = job.run(*line, timeout=120, KERAS_HOME=str(tmp_path), **settings)
    assert result.status == 0, result
    examples_page.check(f"{name}.py", result.output)
    accuracy = float(result.output.split("test accuracy")[1].split("%")[0])
    assert accuracy > 95, result
