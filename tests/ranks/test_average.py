"""`mpidl.average`: arrays of one's own."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl.array import to_numpy
from mpidl.average import PACKED_BYTES, SMALL_BYTES
from mpidl.errors import InvalidArgument, RankMismatch, UnsupportedDtype
from mpidl.strategies import AllReduce


class Jax:
    """Stands for an array of a library that changes none."""

    __module__ = "jax._src.array"


class Torn:
    """Raises an error of its own when asked for its memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("it is torn")

    __dlpack__ = __dlpack_device__


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
        (np.zeros(3, np.complex64), UnsupportedDtype, r"arrays\[1\] has dtype complex64"),
        (
            np.zeros(3, np.int32),
            UnsupportedDtype,
            "int32; supported are bfloat16, float16, float32",
        ),
        (bytearray(8), UnsupportedDtype, "uint8"),
        (array.array("l", [1]), UnsupportedDtype, "int64"),
        (b"12345678", InvalidArgument, r"arrays\[1\] is read-only"),
        ("text", InvalidArgument, r"arrays\[1\] is a str"),
        (
            Jax(),
            InvalidArgument,
            r"is a Jax, which is read-only: .*; mpidl.jax.average returns new",
        ),
        (Torn(), InvalidArgument, "is a Torn whose memory cannot be shared: it is torn"),
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


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "a", None, np.ones(2)])
def test_wrong_weights(weight: Any, world: mpidl.World) -> None:
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
    with pytest.raises(RankMismatch, match=r"\(4,\) float64, where rank 0 has .*\(3,\) float64"):
        mpidl.average(np.zeros(4 if last else 3))
    several = [np.zeros(2), np.zeros((2, 3 + last)), np.zeros(4)]
    with pytest.raises(
        RankMismatch, match=r": arrays\[1\] \(2, 4\) .*has arrays\[1\] \(2, 3\) .{7}$"
    ):
        mpidl.average(several)
    with pytest.raises(RankMismatch, match=r"\['b'\].* where rank 0 has .*\['a'\]"):
        mpidl.average({"b" if last else "a": np.zeros(3)})


def test_nan_of_a_rank_without_weight_does_not_count(world: mpidl.World) -> None:
    first = world.rank == 0 and world.size > 1
    array = np.full(3, np.nan if first else 2.0)
    mpidl.average(array, weight=0 if first else 1)
    np.testing.assert_array_equal(array, 2)


def test_many_arrays_travel_together(
    world: mpidl.World, own: np.random.Generator, rng: np.random.Generator, xp: Any
) -> None:
    """Small and large ones, of several dtypes in any order, around the sizes where pieces end."""
    dtypes = [np.float32, np.float64, np.float16]
    packed, small = PACKED_BYTES // 4, SMALL_BYTES // 4
    sizes = [0, 1, 7, small - 1, small, packed - 1, packed, packed + 1, *rng.integers(1, small, 25)]
    mine = []
    for size in rng.permutation(sizes):
        values = own.standard_normal(2 * int(size)).astype(dtypes[rng.integers(3)])
        mine.append(xp.asarray(values)[:: 1 + rng.integers(2)])
    weight = [3.0, 1.0, 0.5, 2.0][world.rank % 4]
    held = [to_numpy(each).copy() for each in mine]
    mpidl.average(mine, weight=weight)
    share = weight / world.sum([weight])[0]
    for found, before in zip(map(to_numpy, mine), held, strict=True):
        expected = world.sum(before.astype(np.float64) * share)
        rounding = {2: 2**-11, 4: 1e-6, 8: 1e-14}[before.itemsize]
        np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)


def test_few_calls_for_many_arrays(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.size == 1:
        pytest.skip("one rank has nobody to send to")
    calls = []
    reduce = AllReduce.reduce

    def counted(self: AllReduce, grad: Any, weight: float) -> Any:
        calls.append(grad.nbytes)
        return reduce(self, grad, weight)

    monkeypatch.setattr(AllReduce, "reduce", counted)
    arrays = [np.full(256, world.rank, np.float32) for _ in range(1000)]
    mpidl.average(arrays)
    assert calls == [PACKED_BYTES, 1024 * 1000 - PACKED_BYTES]
    mpidl.average([np.zeros(SMALL_BYTES, np.uint8).view(np.float64) for _ in range(3)])
    assert calls[2:] == [SMALL_BYTES] * 3


@pytest.mark.parametrize("size", [5, PACKED_BYTES])
def test_halves_are_added_up_in_float32(size: int, world: mpidl.World, xp: Any) -> None:
    """Sums pass 65504 where means do not, and 1 is lost where it is added to 4096 in float16."""
    high = xp.full(size, 60000, np.float16)
    mpidl.average(high)
    np.testing.assert_array_equal(to_numpy(high), np.float16(60000))
    fine = xp.full(size, 4096 if world.rank == 0 else 1, np.float16)
    mpidl.average(fine)
    mean = np.float32((4096 + world.size - 1) / world.size).astype(np.float16)
    np.testing.assert_array_equal(to_numpy(fine), mean)


def test_the_same_array_twice(world: mpidl.World) -> None:
    """As tied weights are: each counts once."""
    tied = np.full(3, float(world.rank))
    mpidl.average([tied, tied, {"part": tied[1:]}])
    np.testing.assert_allclose(tied, (world.size - 1) / 2, rtol=1e-15)
