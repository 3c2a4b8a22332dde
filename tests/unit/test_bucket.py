"""The layout of buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import bucket
from mpidl.array import ALIGNMENT_BYTES
from mpidl.errors import UnsupportedDtype
from mpidl.strategies.base import private

if TYPE_CHECKING:
    from mpidl.array import Array, Layout


class Memory:
    """Of a strategy, the part that hands out memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def allocate(self, size: int, dtype: Any, xp: Any, _layout: Layout) -> tuple[Array, Array]:
        assert xp is np
        self.asked.append((size, np.dtype(dtype).name))
        return private(size, dtype, xp)


def model(rng: np.random.Generator) -> dict[str, Array]:
    """Return arrays of random number, shapes (also of no element, also of no axis) and dtypes."""
    arrays = {}
    for i in range(int(rng.integers(1, 12))):
        shape = tuple(map(int, rng.integers(0, 20, rng.integers(0, 4))))
        dtype = ("float32", "float64")[int(rng.integers(2))]
        arrays[f"p{i}"] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return arrays


def allocate(arrays: dict[str, Array], bucket_bytes: int) -> list[bucket.Bucket]:
    return bucket.allocate(arrays, Memory(), bucket_bytes)  # type: ignore[arg-type]


@pytest.fixture(params=[1, 1000, 1 << 30])
def bucket_bytes(request: pytest.FixtureRequest) -> int:
    return request.param


def test_values_round_trip(bucket_bytes: int, rng: np.random.Generator) -> None:
    arrays = model(rng)
    buckets = allocate(arrays, bucket_bytes)
    for flat in buckets:
        for name, param, grad in flat.views():
            param[...], grad[...] = arrays[name], -arrays[name]
    seen = []
    for flat in buckets:  # only now: no view may have written over another
        for name, param, grad in flat.views():
            seen.append(name)
            np.testing.assert_array_equal(param, arrays[name])
            np.testing.assert_array_equal(grad, -arrays[name])
            assert param.dtype == grad.dtype == arrays[name].dtype
    assert sorted(seen) == sorted(arrays)


def test_views_are_views_that_share_no_element(bucket_bytes: int, rng: np.random.Generator) -> None:
    for flat in allocate(model(rng), bucket_bytes):
        for name, param, grad in flat.views():
            param += 1
            grad += 1
            if param.size:
                assert np.shares_memory(param, flat.param), name
                assert np.shares_memory(grad, flat.grad), name
        assert set(np.unique(flat.param)) <= {0, 1}, "an element belongs to two views"
        assert flat.param.sum() == flat.grad.sum() == sum(p.size for _, p, _ in flat.views())


def test_every_array_starts_on_a_cache_line(bucket_bytes: int, rng: np.random.Generator) -> None:
    for flat in allocate(model(rng), bucket_bytes):
        assert flat.param.nbytes % ALIGNMENT_BYTES == 0
        for _, param, grad in flat.views():
            if param.size:  # NumPy gives no address to an empty view
                assert param.ctypes.data % ALIGNMENT_BYTES == 0
                assert grad.ctypes.data % ALIGNMENT_BYTES == 0


def test_a_bucket_has_one_dtype(bucket_bytes: int, rng: np.random.Generator) -> None:
    arrays = model(rng)
    for flat in allocate(arrays, bucket_bytes):
        assert {arrays[name].dtype for name in flat.places} == {flat.param.dtype}
        assert flat.grad.dtype == flat.param.dtype
        assert flat.grad.shape == flat.param.shape


def test_the_last_array_comes_first(bucket_bytes: int, rng: np.random.Generator) -> None:
    arrays = model(rng)
    buckets = allocate(arrays, bucket_bytes)
    for dtype in ("float32", "float64"):
        names = [n for flat in buckets if flat.param.dtype == dtype for n in flat.places]
        assert names == [n for n in reversed(arrays) if arrays[n].dtype == dtype]
    for flat in buckets:
        starts = [start for start, _ in flat.places.values()]
        assert starts == sorted(starts)


def test_buckets_are_about_as_large_as_asked_for() -> None:
    arrays = {f"p{i}": np.zeros(100, np.float32) for i in range(10)}  # 448 bytes each, aligned
    memory = Memory()
    buckets = bucket.allocate(arrays, memory, 1000)  # type: ignore[arg-type]
    assert [len(flat.places) for flat in buckets] == [3, 3, 3, 1]
    assert memory.asked == [(336, "float32")] * 3 + [(112, "float32")]


def test_a_bucket_is_closed_by_the_array_that_fills_it(rng: np.random.Generator) -> None:
    for flat in allocate(model(rng), 1000):
        last_start = list(flat.places.values())[-1][0]
        assert last_start * flat.param.itemsize < 1000


def test_one_large_bucket_per_dtype() -> None:
    arrays = {
        "a": np.zeros(3),
        "b": np.zeros((2, 2), np.float32),
        "c": np.zeros(5),
        "d": np.zeros((), np.float32),
    }
    buckets = allocate(arrays, 1 << 30)
    assert [flat.places for flat in buckets] == [
        {"d": (0, ()), "b": (16, (2, 2))},
        {"c": (0, (5,)), "a": (8, (3,))},
    ]


def test_the_same_model_gets_the_same_layout(rng: np.random.Generator) -> None:
    arrays = model(rng)
    first, second = (allocate(arrays, 500) for _ in range(2))
    assert [flat.places for flat in first] == [flat.places for flat in second]


@pytest.mark.parametrize("dtype", ["float16", "int64", "complex64", "bool", ">f4"])
def test_what_mpi_cannot_sum_is_refused(dtype: str) -> None:
    message = f"parameter w has dtype {dtype}; supported are float32, float64"
    with pytest.raises(UnsupportedDtype, match=message):
        bucket.check_dtype(np.zeros(3, dtype), "parameter w")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_mpi_can_sum_is_taken(dtype: str) -> None:
    bucket.check_dtype(np.zeros(3, dtype), "parameter w")


def test_a_bucket_has_one_group(bucket_bytes: int, rng: np.random.Generator) -> None:
    arrays = model(rng)
    group_of = {name: int(rng.integers(3)) for name in arrays}
    buckets = bucket.allocate(arrays, Memory(), bucket_bytes, group_of)  # type: ignore[arg-type]
    for flat in buckets:
        assert {group_of[name] for name in flat.places} == {flat.group}
        assert {arrays[name].dtype for name in flat.places} == {flat.param.dtype}
    assert sorted(name for flat in buckets for name in flat.places) == sorted(arrays)


def test_parts_of_owners(bucket_bytes: int, rng: np.random.Generator) -> None:
    """Cut anywhere, the owned slices hold every element of every array once, and no padding."""
    for flat in allocate(model(rng), bucket_bytes):
        for _, param, grad in flat.views():
            param[...] = grad[...] = 1
        n = flat.param.size
        ends = [0, *sorted(map(int, rng.integers(0, n + 1, 3))), n]
        seen = dict.fromkeys(flat.places, 0)
        for owned in map(slice, ends, ends[1:]):
            parts = flat.parts(owned)
            assert len(parts) == len(flat.places)
            for name, part in zip(flat.places, parts, strict=True):
                assert 0 <= part.start <= part.stop <= owned.stop - owned.start
                mine = flat.param[owned][part]
                assert (mine == 1).all()
                start, _ = flat.places[name]
                if mine.size:  # they come in order: this one is where the last one ended
                    assert owned.start + part.start == start + seen[name]
                seen[name] += mine.size
        assert seen == {name: int(np.prod(shape)) for name, (_, shape) in flat.places.items()}
