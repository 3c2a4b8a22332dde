"""mpidl.torch, mpidl.jax, mpidl.keras and mpidl.tensorflow, given what nobody should give them.

As tests/fuzz/test_public.py does, on one rank, with tensors of theirs besides; no public name is
missing from the tables. tests/peers/test_torch_disagreement.py does it on several.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ALL
from tests.fuzz.test_public import fuzz

#: Tables, what they need, and the backend of Keras: a process can have one.
RUNS = {
    "torch": ("torch,torch_training", ("torch",), ""),
    "jax": ("jax,keras", ("jax", "optax", "keras"), "jax"),
    "keras on torch": ("keras", ("torch", "keras"), "torch"),
    "tensorflow": ("tensorflow", ("tensorflow",), ""),
}
EXAMPLES = 100 if ALL else 4


@pytest.fixture(params=RUNS)
def tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found, needed, backend = RUNS[request.param]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: see docs/frameworks.md")
    if backend:
        monkeypatch.setenv("KERAS_BACKEND", backend)
    return found


def test_only_documented_errors(tables: str, tmp_path: Path) -> None:
    fuzz(tables, tmp_path, "--complete", "--examples", str(EXAMPLES))


@pytest.mark.soak
def test_each_hostile_value_in_each_place(tables: str, tmp_path: Path) -> None:
    fuzz(tables, tmp_path, "--all")
