"""What optimizers are given: layers, clipped gradients, and the parameters of their group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpidl.accumulation import Accumulation
from mpidl.array import CACHE_BLOCK_BYTES, GRAIN
from mpidl.bucket import Bucket
from mpidl.errors import InvalidArgument, MissingBackward, NonFiniteGradient
from mpidl.optim import SGD, Layers
from mpidl.optim.base import square_sums
from mpidl.optim.clip import Clip
from mpidl.optim.groups import assign

LARGE = 3 * CACHE_BLOCK_BYTES // 8 + 5


@pytest.mark.parametrize("n", [0, 1, 100, GRAIN, LARGE])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_square_sums(n: int, dtype: type, rng: np.random.Generator) -> None:
    """A grain has the same bits in whatever slice it lies, and wherever that lies in memory."""
    x = rng.standard_normal(n).astype(dtype)
    start = int(rng.integers(0, 3 * GRAIN))
    found = square_sums(x, start)
    cuts = [c for c in range(0, start + n, GRAIN) if c > start]
    pieces = np.split(x, [c - start for c in cuts]) if n else []
    expected = [np.sum(piece.astype(np.float64) ** 2) for piece in pieces]
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype is np.float64 else 1e-6)
    if cuts:
        cut = int(rng.choice(cuts))
        apart = np.empty(n + 1, dtype)[1:]
        apart[:] = x
        halves = square_sums(apart[: cut - start], start), square_sums(apart[cut - start :], cut)
        np.testing.assert_array_equal(np.concatenate(halves), found)


def test_norms_are_summed_over_owners_in_one_call(rng: np.random.Generator) -> None:
    """Two owners of one bucket of three parameters; the second of these straddles the cut."""
    a, b = rng.standard_normal((2, 20))
    own = slice(0, 9)
    squares_of_other = [[0, (x[9:12] ** 2).sum(), (x[12:20] ** 2).sum()] for x in (a, b)]
    calls = []

    def total(values: Any) -> np.ndarray:
        calls.append(list(values))
        return np.array(values) + np.ravel(squares_of_other)

    wholes = [slice(0, 4), slice(4, 12), slice(12, 20)]
    layers = Layers([slice(0, 4), slice(4, 9), slice(0, 0)], total, wholes)
    found = layers.norms(a[own], b[own])
    expected = [
        [np.linalg.norm(x[p]) for p in (slice(4), slice(4, 12), slice(12, 20))] for x in (a, b)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.dtype == np.float64
    assert len(calls) == 1 and len(calls[0]) == 6


@pytest.mark.parametrize("value", [None, 0.5, np.float64(0.5)])
@pytest.mark.parametrize("norm", [None, 3.0, 1e6])
@pytest.mark.parametrize("n", [0, 7, LARGE])
def test_clip(value: Any, norm: float | None, n: int, rng: np.random.Generator) -> None:
    g = rng.standard_normal(n).astype(np.float32)
    expected = g.astype(np.float64)
    if value is not None:
        expected = np.clip(expected, -0.5, 0.5)
    size = np.linalg.norm(expected)
    if norm is not None and size > norm:
        expected *= norm / (size + 1e-6)
    clip = Clip(value, norm)
    factor = 1.0 if norm is None else clip.factor(clip.measure(g).sum() ** 0.5)
    clip.finish(g, factor)
    np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-7)


def test_clip_by_norm_is_that_of_pytorch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    for scale in (1e-4, 0.3, 100.0):
        g = scale * rng.standard_normal(50)
        theirs = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
        theirs.grad = torch.from_numpy(g.copy())
        torch.nn.utils.clip_grad_norm_([theirs], 0.7)
        clip = Clip(None, 0.7)
        clip.finish(g, clip.factor(np.sqrt(clip.measure(g).sum())))
        np.testing.assert_allclose(g, theirs.grad.numpy(), rtol=1e-13)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["value", "norm"])
def test_bounds_that_cannot_be(name: str, bad: float) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"clip_{name}={bad}: expected 0 < clip_{name} < inf"
    ):
        Clip(**{name: bad})


NAMES = ["0.weight", "0.bias", "head.weight", "head.bias"]


def test_the_first_pattern_that_matches_counts() -> None:
    a, b, c = SGD(1), SGD(2), SGD(3)
    optimizers, group_of = assign({"*.bias": a, "head.*": b, "*": c}, NAMES)
    assert [id(o) for o in optimizers] == [id(a), id(b), id(c)]
    assert group_of == {"0.weight": 2, "0.bias": 0, "head.weight": 1, "head.bias": 0}
    assert assign(a, NAMES) == ([a], dict.fromkeys(NAMES, 0))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"*.bias": SGD(1)},
            r"no optimizer for parameter 0\.weight: .* none of '\*\.bias'; end wi",
        ),
        (
            {"*.Bias": SGD(1), "*": SGD(1)},
            r"pattern '\*\.Bias' gets no parameter .* of 0\.weight, ",
        ),
        ({"*": SGD(1), "*.bias": SGD(1)}, r"pattern '\*\.bias' gets no parameter \(the first mat"),
        ({}, r"no optimizer for parameter 0\.weight"),
        (SGD, r"optimizer for '\*': expected one such as SGD\(lr=0\.1\), found <class"),
        ({"*": 0.1}, r"optimizer for '\*': expected one such as SGD\(lr=0\.1\), found 0\.1"),
    ],
)
def test_groups_that_cannot_be(groups: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        assign(groups, NAMES)


def buckets_of(*grads: np.ndarray) -> list[Bucket]:
    return [Bucket(np.zeros_like(g), g, {}) for g in grads]


def test_accumulation_is_the_mean_over_samples(rng: np.random.Generator) -> None:
    """Twice, so that nothing of the first group is left in the second; of NaN without samples."""
    grads = [np.zeros(LARGE, np.float32), np.zeros(3)]
    accumulation = Accumulation(buckets_of(*grads), 3)
    for samples in ([3, 0, 1.5, 8], [0, 2], [0, 0], [1]):
        seen = [[rng.standard_normal(g.size) for g in grads] for _ in samples]
        for n, made in zip(samples, seen, strict=True):
            for g, values in zip(grads, made, strict=True):
                g[...] = values if n else np.nan
            accumulation.add(n, None)
        assert accumulation.passes == len(samples)
        assert accumulation.mean() == (sum(samples), None)
        assert accumulation.passes == 0
        for i, g in enumerate(grads):
            expected = sum(n * made[i] for n, made in zip(samples, seen, strict=True))
            expected = expected / max(sum(samples), 1)
            tolerance = 1e-12 if g.dtype == np.float64 else 1e-5
            np.testing.assert_allclose(g, expected, rtol=tolerance, atol=tolerance)


def test_the_first_problem_is_kept_until_the_mean() -> None:
    first, second = MissingBackward("first"), NonFiniteGradient("second")
    accumulation = Accumulation(buckets_of(np.ones(2)), 1)
    for problem in (None, first, second, None):
        accumulation.add(0, problem)
    assert accumulation.mean() == (0, first)
    accumulation.add(1, None)
    assert accumulation.mean() == (1, None)
