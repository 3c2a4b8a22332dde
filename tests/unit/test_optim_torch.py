"""Fifty steps of each optimizer that PyTorch has, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpidl import optim
from tests.unit.optimizers import CASES, IDS
from tests.unit.test_optim import layers_of, run

torch = pytest.importorskip("torch")

N = 1000
STEPS = 50
THEIRS = {"initial": "initial_accumulator_value"}  # option -> PyTorch's name of it
TOLERANCES = {np.float64: 1e-10, np.float32: 1e-6}
SHARED = [i for i, (kind, _) in enumerate(CASES) if hasattr(torch.optim, kind.__name__)]


def test_each_that_both_have_is_tested() -> None:
    kinds = {CASES[i][0].__name__ for i in SHARED}
    assert kinds == {"Adagrad", "Adam", "AdamW", "RMSprop", "SGD"}
    assert {kind for kind in optim.__all__ if hasattr(torch.optim, kind)} - kinds == {"Optimizer"}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", SHARED, ids=[IDS[i] for i in SHARED])
def test_fifty_steps(case: int, dtype: Any, rng: np.random.Generator) -> None:
    kind, options = CASES[case]
    if dtype is np.float32:  # 1e-6 is a few units in the last place: rates must be small
        options = {**options, "lr": 1e-3}
    param = rng.uniform(-1, 1, N).astype(dtype)
    grads = rng.standard_normal((STEPS, N)).astype(dtype)
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    named = {THEIRS.get(k, k): v for k, v in options.items()}
    optimizer = getattr(torch.optim, kind.__name__)([theirs], **named)
    for g in grads:
        theirs.grad = torch.from_numpy(g.copy())
        optimizer.step()
    found = run(kind(**options), param, grads, layers_of([N]))
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("defaults", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_defaults_are_those_of_pytorch(defaults: str) -> None:
    theirs = getattr(torch.optim, defaults)([torch.zeros(1)]).defaults
    for name, value in vars(getattr(optim, defaults)()).items():
        assert theirs[THEIRS.get(name, name)] == value, name
