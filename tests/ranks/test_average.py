"""`mpidl.average`: arrays of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, RankMismatch, UnsupportedDtype


def test_nested_arrays_are_changed_in_place(
    world: mpidl.World, own: np.random.Generator, xp: Any
) -> None:
    a, b = own.standard_normal((3, 4)), own.standard_normal(())
    c = own.standard_normal(1001).astype(np.float32)
    mine = {"a": xp.asarray(a), "rest": [xp.asarray(b), (xp.asarray(c),)]}
    held = mine["a"]
    expected = [np.mean(world.gather(v), axis=0) for v in (a, b, c)]
    assert mpidl.average(mine) is mine
    assert mine["a"] is held
    np.testing.assert_allclose(to_numpy(mine["a"]), expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(to_numpy(mine["rest"][0]), expected[1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(to_numpy(mine["rest"][1][0]), expected[2], rtol=1e-5, atol=1e-6)


def test_weights(world: mpidl.World, own: np.random.Generator, xp: Any) -> None:
    """Ranks weigh by their samples; one of weight 0 counts for nothing, and learns the mean."""
    values, weight = own.standard_normal(10), world.rank if world.size > 1 else 3
    array = xp.asarray(values)
    mpidl.average(array, weight=weight)
    expected = np.average(world.gather(values), axis=0, weights=world.gather(weight))
    np.testing.assert_allclose(to_numpy(array), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("view", ["strided", "transposed", "empty", "column", "every other"])
def test_views(view: str, world: mpidl.World, xp: Any) -> None:
    whole = xp.full((6, 4), world.rank, np.float64)
    part = {
        "strided": whole[::2, 1:3],
        "transposed": whole.T,
        "empty": whole[:0],
        "column": whole[:, 1],
        "every other": whole.reshape(-1)[::-2],
    }[view]
    mpidl.average(part)
    mean = (world.size - 1) / 2
    np.testing.assert_allclose(to_numpy(part), np.full(part.shape, mean), rtol=1e-12)
    changed = int((to_numpy(whole) == mean).sum())
    untouched = whole.size if mean == world.rank else part.size
    assert changed == untouched


def test_nothing_to_average(world: mpidl.World) -> None:
    assert mpidl.average([]) == []


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (np.zeros(3, np.float16), UnsupportedDtype, r"arrays\[1\] has dtype float16"),
        (np.zeros(3, np.int32), UnsupportedDtype, "int32"),
        (3.0, InvalidArgument, r"arrays\[1\] is a float"),
        (None, InvalidArgument, "NoneType"),
        (np.broadcast_to(np.zeros(1), 3), InvalidArgument, "read-only"),
    ],
)
def test_what_cannot_be_averaged(
    bad: Any, error: type[Exception], said: str, world: mpidl.World
) -> None:
    """One rank's mistake is raised on all, and no array is changed anywhere."""
    good = np.full(3, float(world.rank))
    second = bad if world.rank == world.size - 1 else np.zeros(3)
    with pytest.raises(error, match=said):
        mpidl.average([good, second])
    np.testing.assert_array_equal(good, world.rank)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_wrong_weights(weight: float, world: mpidl.World) -> None:
    array = np.full(3, float(world.rank))
    with pytest.raises(InvalidArgument, match="weight"):
        mpidl.average(array, weight=weight if world.rank == 0 else 1)
    with pytest.raises(InvalidArgument, match="weights of all ranks are 0"):
        mpidl.average(array, weight=0)
    np.testing.assert_array_equal(array, world.rank)


def test_arrays_that_differ(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    last = world.rank == world.size - 1
    with pytest.raises(RankMismatch, match=r"\(4,\) float64, but rank 0 has .*\(3,\) float64"):
        mpidl.average(np.zeros(4 if last else 3))
    with pytest.raises(RankMismatch, match=r"\['b'\].* but rank 0 has .*\['a'\]"):
        mpidl.average({"b" if last else "a": np.zeros(3)})


def test_nan_of_a_rank_without_weight_does_not_count(world: mpidl.World) -> None:
    first = world.rank == 0 and world.size > 1
    array = np.full(3, np.nan if first else 2.0)
    mpidl.average(array, weight=0 if first else 1)
    np.testing.assert_array_equal(array, 2)
