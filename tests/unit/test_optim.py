"""SGD against four lines of NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mpidl.array import CACHE_BLOCK_BYTES
from mpidl.errors import InvalidArgument
from mpidl.optim import SGD

COMBINATIONS = [
    {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    for momentum in (0.0, 0.9)
    for nesterov in (False, True)
    for decay in (0.0, 0.01)
    if momentum or not nesterov
]
SIZES = [0, 1, 7, 2 * CACHE_BLOCK_BYTES // 8 + 3]  # the last: more than two blocks of float64
STEPS = 5


def reference(p, grads, lr, momentum, nesterov, weight_decay):
    v = np.zeros_like(p)
    for g in grads:
        g = g + weight_decay * p
        v = momentum * v + g
        p = p - lr * (g + momentum * v if nesterov else v)
    return p


def run(sgd: SGD, param: np.ndarray, grads: np.ndarray, parts: list[slice]) -> np.ndarray:
    """Make a step for each gradient, in each part of the array by itself."""
    param, grads = param.copy(), grads.copy()
    for part in parts:
        state = sgd.init(param[part])
        for g in grads:
            sgd.update(param[part], g[part], state)
    return param


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_five_steps(options: dict, n: int, dtype: type, rng: np.random.Generator) -> None:
    param = rng.standard_normal(n).astype(dtype)
    grads = rng.standard_normal((STEPS, n)).astype(dtype)
    found = run(SGD(0.1, **options), param, grads, [slice(None)])
    expected = reference(param.astype(np.float64), grads.astype(np.float64), 0.1, **options)
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_owners_that_update_slices_make_the_same_bits(
    options: dict, rng: np.random.Generator
) -> None:
    n = SIZES[-1]
    param = rng.standard_normal(n).astype(np.float32)
    grads = rng.standard_normal((STEPS, n)).astype(np.float32)
    ends = [0, *sorted(map(int, rng.integers(0, n + 1, 3))), n]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    sgd = SGD(0.1, **options)
    np.testing.assert_array_equal(
        run(sgd, param, grads, parts), run(sgd, param, grads, [slice(None)])
    )


def test_the_update_is_in_place() -> None:
    param, grad = np.ones(3), np.ones(3)
    sgd = SGD(0.5, momentum=0.9)
    state = sgd.init(param)
    velocity = state["velocity"]
    sgd.update(param, grad, state)
    np.testing.assert_array_equal(param, [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(velocity, [1, 1, 1])
    assert state["velocity"] is velocity


def test_state_exists_only_for_momentum() -> None:
    param = np.ones(3, np.float32)
    assert SGD(0.1).init(param) == {}
    velocity = SGD(0.1, momentum=0.5).init(param)["velocity"]
    assert velocity.dtype == np.float32
    np.testing.assert_array_equal(velocity, np.zeros(3))


def test_the_rate_may_change_between_steps() -> None:
    param, sgd = np.zeros(1), SGD(1.0)
    sgd.update(param, np.ones(1), {})
    sgd.lr = 0.5
    sgd.update(param, np.ones(1), {})
    assert param[0] == -1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "SGD lr=-0.1: expected 0 <= lr < inf"),
        ({"lr": float("nan")}, "SGD lr=nan"),
        ({"lr": float("inf")}, "SGD lr=inf"),
        ({"lr": 1, "momentum": 1.0}, "SGD momentum=1.0: expected 0 <= momentum < 1"),
        ({"lr": 1, "momentum": -0.5}, "SGD momentum=-0.5"),
        ({"lr": 1, "weight_decay": -1}, "SGD weight_decay=-1"),
        ({"lr": 1, "weight_decay": float("nan")}, "SGD weight_decay=nan"),
        ({"lr": 1, "nesterov": True}, "nesterov=True needs a momentum above 0"),
    ],
)
def test_values_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SGD(**options)


def test_a_rate_of_0_changes_nothing() -> None:
    param = np.ones(3)
    SGD(0, weight_decay=0.1).update(param, np.ones(3), {})
    np.testing.assert_array_equal(param, np.ones(3))
