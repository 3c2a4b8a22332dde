"""Scaling in one process; tests/ranks/test_scaling.py has more of them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest

from mpidl.data import ArrayDataset, MinMaxScaler, Scaler, StandardScaler
from mpidl.errors import InvalidArgument
from tests.unit.test_data_files import check_take

SCALERS = [StandardScaler, MinMaxScaler]
SHAPES = [(), (1,), (5,), (2, 3, 4), (0,)]
by_kind = pytest.mark.parametrize("kind", SCALERS, ids=lambda kind: kind.__name__)


def expected(kind: type[Scaler], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and scale, with more digits than those of the code under test."""
    x = x.astype(np.longdouble)
    if kind is MinMaxScaler:
        offset, scale = x.min(axis=0), x.max(axis=0) - x.min(axis=0)
    else:
        offset = x.mean(axis=0)
        scale = np.sqrt(((x - offset) ** 2).mean(axis=0))
    constant = (x == x[0]).all(axis=0)
    return offset.astype(float), np.where(constant, 1, scale).astype(float)


def check_fit(made: Scaler, x: np.ndarray) -> None:
    offset, scale = expected(type(made), x)
    for found, value in ((made.offset, offset), (made.scale, scale)):
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        assert found.shape == x.shape[1:]
        np.testing.assert_allclose(found, value, rtol=1e-10)


@pytest.fixture(params=[1, 100, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes are read at once; 1 is one sample at a time."""
    monkeypatch.setattr(sys.modules["mpidl.data.scale"], "CHUNK_BYTES", request.param)
    return request.param


@by_kind
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "i4", "?"])
def test_fit(
    kind: type[Scaler],
    shape: tuple[int, ...],
    dtype: str,
    chunk: int,
    rng: np.random.Generator,
) -> None:
    for n in (1, 2, int(rng.integers(3, 200))):
        x = (rng.normal(size=(n, *shape)) * 9 + 20).astype(dtype)
        check_fit(kind.fit(ArrayDataset(x, x), world=None), x)


@by_kind
def test_far_from_zero(kind: type[Scaler], chunk: int, rng: np.random.Generator) -> None:
    """The mean of the squares less the square of the mean would have no right digit left."""
    x = rng.normal(size=(3000, 4)) * [1, 1e-3, 1e6, 1e-12] + [1e9, 1e5, 1e9, 0]
    check_fit(kind.fit(ArrayDataset(x, x), world=None), x)


@by_kind
def test_constant_features_become_zero(
    kind: type[Scaler], chunk: int, rng: np.random.Generator
) -> None:
    for dtype in (np.float32, np.float64):
        x = rng.normal(size=(1001, 3)).astype(dtype)
        x[:, 1] = dtype(rng.uniform(-1e6, 1e6)) / dtype(3)
        made = kind.fit(ArrayDataset(x, x), world=None)
        assert made.scale[1] == 1
        scaled = made(x)
        np.testing.assert_array_equal(scaled[:, 1], 0)
        np.testing.assert_array_equal(made.inverse(scaled)[:, 1], x[:, 1])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_scaled_data(dtype: str, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(500, 3)) * [1, 5, 100] + 300).astype(dtype)
    tolerance = max(1e-13, 4 * float(np.finfo(dtype).eps))
    scaled = StandardScaler.fit(ArrayDataset(x, x), world=None)(x)
    assert scaled.dtype == dtype
    np.testing.assert_allclose(scaled.mean(axis=0, dtype=float), 0, atol=tolerance)
    np.testing.assert_allclose(scaled.std(axis=0, dtype=float), 1, atol=tolerance)
    scaled = MinMaxScaler.fit(ArrayDataset(x, x), world=None)(x)
    np.testing.assert_array_equal(scaled.min(axis=0), np.zeros(3))
    np.testing.assert_array_equal(scaled.max(axis=0), np.ones(3))


@by_kind
def test_scale_and_back(kind: type[Scaler], rng: np.random.Generator) -> None:
    x, other = rng.normal(size=(2, 50, 4, 2)) * 30 + 7
    made = kind.fit(ArrayDataset(x, x), world=None)
    offset, scale = expected(kind, x)
    np.testing.assert_allclose(made(other), (other - offset) / scale, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(made.inverse(made(other)), other, rtol=1e-10, atol=1e-10)
    for found in (made(other.astype("f4")), made.inverse(made(other.astype("f4")))):
        assert found.dtype == np.float32


@by_kind
def test_integers_become_float32(kind: type[Scaler], rng: np.random.Generator) -> None:
    x = rng.integers(256, size=(50, 4)).astype(np.uint8)
    made = kind.fit(ArrayDataset(x, x), world=None)
    offset, scale = expected(kind, x)
    assert made(x).dtype == np.float32
    np.testing.assert_allclose(made(x), (x - offset) / scale, rtol=1e-6, atol=1e-6)


@by_kind
def test_apply(kind: type[Scaler], rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(50, 4)).astype("f4"), rng.integers(9, size=50)
    made = kind.fit(ArrayDataset(x, y), world=None)
    other = ArrayDataset(x[::-1] * 3, y)
    before = x.copy()
    check_take(made.apply(other), made(other.x), y, rng)
    np.testing.assert_array_equal(x, before)


@by_kind
def test_saved_and_loaded(kind: type[Scaler], rng: np.random.Generator) -> None:
    x = rng.normal(size=(50, 4))
    made = kind.fit(ArrayDataset(x, x), world=None)
    for copy in (pickle.loads(pickle.dumps(made)), kind(made.offset, made.scale)):
        assert type(copy) is kind
        np.testing.assert_array_equal(copy(x), made(x))


@by_kind
def test_targets_are_left_alone(kind: type[Scaler]) -> None:
    x, y = np.arange(6.0)[:, None], np.array([np.nan, 1, 2, 3, 4, 5])
    found = kind.fit(ArrayDataset(x, y), world=None).apply(ArrayDataset(x, y))
    np.testing.assert_array_equal(found.take(np.arange(6))[1], y)


@by_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0, 0), (37, 1, 2), (99, 0, 1)])
def test_numbers_that_are_none(
    kind: type[Scaler], bad: float, at: tuple[int, ...], chunk: int, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(100, 2, 3))
    x[at] = bad
    message = (
        f"{kind.__name__}.fit: feature {at[1]}, {at[2]} of sample {at[0]} is {bad}: expected finite"
    )
    with pytest.raises(InvalidArgument, match=message):
        kind.fit(ArrayDataset(x, x), world=None)
    flat = x[:, at[1], at[2]]
    with pytest.raises(InvalidArgument, match=f"fit: sample {at[0]} is {bad}: expected finite"):
        kind.fit(ArrayDataset(flat, flat), world=None)


def make(n: int, *shape: int, dtype: str = "f4") -> Callable[[], ArrayDataset]:
    return lambda: ArrayDataset(np.zeros((n, *shape), dtype), np.zeros(n))


@by_kind
def test_data_that_cannot_be(kind: type[Scaler]) -> None:
    with pytest.raises(InvalidArgument, match=f"{kind.__name__}.fit: the data set is empty"):
        kind.fit(make(0, 3)(), world=None)
    with pytest.raises(InvalidArgument, match="inputs of dtype complex64: expected real numbers"):
        kind.fit(make(4, dtype="c8")(), world=None)
    made = kind.fit(make(4, 3)(), world=None)
    message = rf"{kind.__name__}: features of shape \(2, 3\): expected \(3,\), as in the data of"
    for use in (made, made.inverse):
        with pytest.raises(InvalidArgument, match=message):
            use(np.zeros((3, 2, 3)))
