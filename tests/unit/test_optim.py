"""Each optimizer against its formula, in any cut of the parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mpidl import optim
from mpidl.array import CACHE_BLOCK_BYTES, blocks
from mpidl.errors import InvalidArgument
from mpidl.optim import SGD, Adagrad, Adam, AdamW, Layers, RMSprop, schedules
from tests.unit.optimizers import CASES, IDS, REFERENCES

LARGE = 2 * CACHE_BLOCK_BYTES // 8 + 3  # more than two blocks of float64
SIZES = [[0], [1], [7, 0, 12], [5, LARGE, 3]]
STEPS = 5
every = pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)


def layers_of(sizes: list[int]) -> Layers:
    """Return the layers of a slice that one rank owns all of."""
    ends = np.cumsum([0, *sizes]).tolist()
    return Layers([slice(a, b) for a, b in pairwise(ends)], np.array)


def run(optimizer: Any, param: np.ndarray, grads: np.ndarray, layers: Layers) -> np.ndarray:
    """Make a step for each gradient."""
    param = param.copy()
    state = optimizer.init(param)
    for step, g in enumerate(grads):
        optimizer.update(param, np.empty_like(g), state, step, layers, whole(g.copy()))
    return param


def whole(grad: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the gradient as `Update` does: in blocks."""
    yield from ((part, grad[part]) for part in blocks(grad))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@every
def test_five_steps(
    kind: type, options: dict, sizes: list[int], dtype: type, rng: np.random.Generator
) -> None:
    param = rng.standard_normal(sum(sizes)).astype(dtype)
    grads = rng.standard_normal((STEPS, sum(sizes))).astype(dtype)
    layers = layers_of(sizes)
    found = run(kind(**options), param, grads, layers)
    cut = [param[part] for part in layers.parts]
    *_, expected = REFERENCES[kind](cut, [[g[p] for p in layers.parts] for g in grads], **options)
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype is np.float64 else 2e-5
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("start", [0.0, 1.0])
@every
def test_parameters_may_start_from_zeros(
    kind: type, options: dict, start: float, rng: np.random.Generator
) -> None:
    """Beside one that has no gradient: no norm of 0 is divided by, or holds a parameter back."""
    param, grads = np.zeros(8), rng.standard_normal((STEPS, 8))
    param[4:], grads[:, 4:] = start, 0
    layers = layers_of([4, 4])
    found = run(kind(**options), param, grads, layers)
    cut = [param[part] for part in layers.parts]
    *_, expected = REFERENCES[kind](cut, [[g[p] for p in layers.parts] for g in grads], **options)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-12, atol=1e-15)
    assert (found[:4] != 0).all()


@every
def test_the_gradient_may_come_in_any_pieces(
    kind: type, options: dict, rng: np.random.Generator
) -> None:
    """Each is there until the next one is asked for; the bits are those of the whole."""
    param = rng.standard_normal(LARGE).astype(np.float32)
    grads = rng.standard_normal((STEPS, LARGE)).astype(np.float32)
    layers, optimizer = layers_of([5, LARGE - 5]), kind(**options)
    ends = [0, *sorted(map(int, rng.integers(0, LARGE + 1, 3))), LARGE]
    expected = run(optimizer, param, grads, layers)
    state = optimizer.init(param)
    for step, g in enumerate(grads):

        def averages() -> Iterator[tuple[slice, np.ndarray]]:
            for a, b in pairwise(ends):
                piece = g[a:b].copy()  # noqa: B023
                yield slice(a, b), piece
                piece.fill(np.nan)

        coming = averages()
        optimizer.update(param, np.full_like(g, np.nan), state, step, layers, coming)
        assert next(coming, None) is None
    np.testing.assert_array_equal(param, expected)


@every
def test_the_update_is_in_place(kind: type, options: dict, rng: np.random.Generator) -> None:
    """In the parameters' dtype, or half of the memory traffic would be for nothing."""
    param = rng.standard_normal(9).astype(np.float32)
    grad = rng.standard_normal(9).astype(np.float32)
    optimizer = kind(**options)
    state = optimizer.init(param)
    before, param_before = copy.deepcopy(state), param.copy()
    kept = dict(state)
    optimizer.update(param, grad, state, 0, layers_of([9]), whole(grad))
    assert (param != param_before).all()
    for name, array in state.items():
        assert array is kept[name]
        assert array.dtype == np.float32 and array.shape == (9,)
        assert (array != before[name]).all(), name


@every
def test_elements_without_a_gradient_stay_zero(kind: type, options: dict) -> None:
    """As the padding of buckets does: it must not become NaN."""
    param, optimizer = np.zeros(4, np.float32), kind(**options)
    state = optimizer.init(param)
    for step in range(3):
        zeros = np.zeros(4, np.float32)
        optimizer.update(param, zeros, state, step, layers_of([4]), whole(zeros))
    np.testing.assert_array_equal(param, np.zeros(4))


@every
def test_numpy_numbers_as_options(kind: type, options: dict, rng: np.random.Generator) -> None:
    """A NumPy float64 must not make float32 arrays compute in float64."""
    param = rng.standard_normal(9).astype(np.float32)
    grads = rng.standard_normal((STEPS, 9)).astype(np.float32)
    numbers = {
        k: tuple(map(np.float64, v))
        if k == "betas"
        else v
        if isinstance(v, bool)
        else np.float64(v)
        for k, v in options.items()
    }
    np.testing.assert_array_equal(
        run(kind(**numbers), param, grads, layers_of([9])),
        run(kind(**options), param, grads, layers_of([9])),
    )


@every
def test_a_rate_of_0_changes_nothing(kind: type, options: dict, rng: np.random.Generator) -> None:
    param = rng.standard_normal(5)
    before, optimizer = param.copy(), kind(**{**options, "lr": 0})
    grad, state = rng.standard_normal(5), optimizer.init(param)
    optimizer.update(param, grad, state, 0, layers_of([5]), whole(grad))
    np.testing.assert_array_equal(param, before)


@every
def test_the_rate_may_be_a_schedule(kind: type, options: dict, rng: np.random.Generator) -> None:
    """Each step must have its own rate: the reference is fed one that changes under its feet."""
    param, grads = rng.standard_normal(6), rng.standard_normal((STEPS, 6))
    rates = rng.uniform(0.01, 0.1, STEPS)
    found = run(kind(**{**options, "lr": lambda t: rates[t]}), param, grads, layers_of([6]))
    optimizer, expected = kind(**{**options, "lr": 0.0}), param.copy()
    state = optimizer.init(expected)
    for step, g in enumerate(grads):
        optimizer.lr = rates[step]
        grad = g.copy()
        optimizer.update(expected, grad, state, step, layers_of([6]), whole(grad))
    np.testing.assert_array_equal(found, expected)
    assert (found != param).all()


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
@every
def test_rates_that_cannot_be(kind: type, options: dict, bad: float) -> None:
    """They are told before the gradients are averaged, and so on every rank."""

    def never() -> Iterator[tuple[slice, np.ndarray]]:
        raise AssertionError("a rank began to average")
        yield

    with pytest.raises(InvalidArgument, match=rf"{kind.__name__} lr={bad}: expected 0 <= lr < inf"):
        kind(**{**options, "lr": bad})
    optimizer = kind(**{**options, "lr": lambda t: bad if t == 2 else 0.1})
    param = np.ones(3)
    state = optimizer.init(param)
    grad = np.ones(3)
    optimizer.update(param, grad, state, 1, layers_of([3]), whole(grad))
    before = param.copy()
    with pytest.raises(InvalidArgument, match=rf"{kind.__name__} lr at step 2 is {bad} by <func"):
        optimizer.update(param, np.ones(3), state, 2, layers_of([3]), never())
    np.testing.assert_array_equal(param, before)


@every
def test_optimizers_can_be_written_down(kind: type, options: dict) -> None:
    optimizer = kind(**{**options, "lr": schedules.cosine(0.1, steps=10)})
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    names = {**vars(optim), **vars(schedules)}
    assert eval(repr(optimizer), names) == optimizer


def test_the_variance_is_never_below_0() -> None:
    """Of a constant gradient it is 0, and rounding may leave less."""
    for g in np.geomspace(1e-3, 1e3, 50, dtype=np.float32):
        param = np.zeros(64, np.float32)
        grads = np.full((300, 64), g, np.float32)
        found = run(RMSprop(1e-8, alpha=0.5, centered=True), param, grads, layers_of([64]))
        assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (SGD(0.1), set()),
        (SGD(0.1, momentum=0.5), {"velocity"}),
        (Adam(), {"first", "second"}),
        (RMSprop(), {"square"}),
        (RMSprop(momentum=0.5, centered=True), {"square", "mean", "velocity"}),
        (Adagrad(initial=0.5), {"square"}),
        (optim.LARS(0.1), {"velocity"}),
        (optim.LAMB(), {"first", "second"}),
    ],
    ids=str,
)
def test_state_holds_what_is_needed(optimizer: Any, names: set[str]) -> None:
    state = optimizer.init(np.ones(3, np.float32))
    assert set(state) == names
    for array in state.values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.full(3, getattr(optimizer, "initial", 0)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SGD, {"lr": 1, "momentum": 1.0}, "SGD momentum=1.0: expected 0 <= momentum < 1"),
        (SGD, {"lr": 1, "momentum": -0.5}, "SGD momentum=-0.5"),
        (SGD, {"lr": 1, "weight_decay": -1}, "SGD weight_decay=-1"),
        (SGD, {"lr": 1, "weight_decay": float("nan")}, "SGD weight_decay=nan"),
        (SGD, {"lr": 1, "nesterov": True}, "nesterov=True needs a momentum above 0"),
        (Adam, {"betas": (0.9, 1.0)}, r"Adam betas=\(0.9, 1.0\): expected 0 <= betas < 1"),
        (Adam, {"betas": (-0.1, 0.9)}, r"Adam betas=\(-0.1, 0.9\)"),
        (Adam, {"eps": 0}, "Adam eps=0: expected 0 < eps < inf"),
        (AdamW, {"weight_decay": 1.5}, "AdamW weight_decay=1.5"),
        (AdamW, {"betas": (0.9, float("nan"))}, "AdamW betas"),
        (AdamW, {"eps": -1}, "AdamW eps=-1"),
        (RMSprop, {"alpha": 1}, "RMSprop alpha=1: expected 0 <= alpha < 1"),
        (RMSprop, {"momentum": 2}, "RMSprop momentum=2"),
        (RMSprop, {"weight_decay": -2}, "RMSprop weight_decay=-2"),
        (RMSprop, {"eps": float("nan")}, "RMSprop eps=nan"),
        (Adagrad, {"lr_decay": -1}, "Adagrad lr_decay=-1: expected 0 <= lr_decay < inf"),
        (Adagrad, {"initial": -1}, "Adagrad initial=-1"),
        (Adagrad, {"weight_decay": 1}, "Adagrad weight_decay=1"),
        (Adagrad, {"eps": 0.0}, "Adagrad eps=0.0"),
        (optim.LARS, {"lr": 1, "trust": -1}, "LARS trust=-1"),
        (optim.LARS, {"lr": 1, "momentum": 1}, "LARS momentum=1"),
        (optim.LARS, {"lr": 1, "weight_decay": 1}, "LARS weight_decay=1"),
        (optim.LAMB, {"betas": (1, 0)}, "LAMB betas"),
        (optim.LAMB, {"eps": 0}, "LAMB eps=0"),
        (optim.LAMB, {"weight_decay": -1}, "LAMB weight_decay=-1"),
    ],
)
def test_values_that_cannot_be(kind: type, options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        kind(**options)
