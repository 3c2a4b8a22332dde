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

#: Tables with what each needs, in one process, which can have one backend of Keras: its name.
RUNS = {
    "torch": {"torch": "torch", "torch_training": "torch", "keras": "keras"},
    "jax": {"jax": "optax", "keras": "keras"},
    "tensorflow": {"tensorflow": "tensorflow"},
}
EXAMPLES = 100 if ALL else 3


@pytest.fixture(params=RUNS)
def tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    backend = request.param
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed: see docs/frameworks.md")
    monkeypatch.setenv("KERAS_BACKEND", backend)
    return ",".join(name for name, needed in RUNS[backend].items() if find_spec(needed))


def test_only_documented_errors(tables: str, tmp_path: Path) -> None:
    fuzz(tables, tmp_path, "--complete", "--examples", str(EXAMPLES))


@pytest.mark.soak
def test_each_hostile_value_in_each_place(tables: str, tmp_path: Path) -> None:
    fuzz(tables, tmp_path, "--all")
