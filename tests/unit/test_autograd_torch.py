"""The large operations against PyTorch: values and all gradients, on fresh shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as their

from mpidl import Tensor, functional
from tests.unit.draws import flip, pick, shape
from tests.unit.operations import EINSUMS
from tests.unit.operations_nn import window

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

    Rng = np.random.Generator

ROUNDS = 8
TOLERANCES = {np.float32: 2e-5, np.float64: 1e-11}


@pytest.fixture(params=list(TOLERANCES), ids=lambda d: d.__name__)
def dtype(request: pytest.FixtureRequest) -> type:
    return request.param


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., torch.Tensor],
    arrays: list[Array],
    dtype: type,
    rng: Rng,
) -> None:
    """Compare values, and the gradients of all `arrays` for random weights of the elements."""
    leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    others = [torch.tensor(leaf.data, requires_grad=True) for leaf in leaves]
    found, expected = ours(*leaves), theirs(*others)
    tolerance = TOLERANCES[dtype]
    assert found.dtype == dtype
    assert found.shape == tuple(expected.shape)
    close(found.data, expected, tolerance)
    weights = rng.standard_normal(found.shape).astype(dtype)
    found.backward(weights)
    expected.backward(torch.tensor(weights))
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        close(leaf.grad, other.grad, tolerance)


def close(found: Array, expected: Any, tolerance: float) -> None:
    """Compare relative to the largest element: sums cancel."""
    expected = expected.detach().numpy() if expected is not None else np.zeros_like(found)
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def normal(rng: Rng, *shapes: tuple[int, ...]) -> list[Array]:
    return [np.asarray(rng.standard_normal(s)) for s in shapes]


def test_conv2d(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        groups, c, o, n = map(int, rng.integers(1, 5, 4))
        kernel = tuple(map(int, rng.integers(1, 5, 2)))
        options: dict[str, Any] = {
            "stride": window(rng, 1, 3),
            "padding": window(rng, 0, 3),
            "dilation": window(rng, 1, 3),
            "groups": groups,
        }
        size = tuple(map(int, rng.integers(10, 16, 2)))
        arrays = normal(rng, (n, groups * c, *size), (groups * o, c, *kernel), (groups * o,))
        compare(
            lambda *a, k=options: functional.conv2d(*a, **k),
            lambda *a, k=options: their.conv2d(*a, **k),
            arrays[: int(rng.integers(2, 4))],
            dtype,
            rng,
        )


def test_a_convolution_of_many_channels(dtype: type, rng: Rng) -> None:
    """Several blocks of samples, and both ways of laying out their columns."""
    for c, size in ((32, 9), (2, 40)):
        arrays = normal(rng, (7, c, size, size), (16, c, 3, 3), (16,))
        compare(
            lambda *a: functional.conv2d(*a, padding=1),
            lambda *a: their.conv2d(*a, padding=1),
            arrays,
            dtype,
            rng,
        )


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling(kind: str, dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        kernel = tuple(map(int, rng.integers(1, 5, 2)))
        padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
        stride = pick(rng, [None, window(rng, 1, 5)])
        x = normal(rng, (*shape(rng, 2), *map(int, rng.integers(4, 12, 2))))
        compare(
            lambda t, s=stride, k=kernel, p=padding: getattr(functional, f"{kind}_pool2d")(
                t, k, stride=s, padding=p
            ),
            lambda t, s=stride, k=kernel, p=padding: getattr(their, f"{kind}_pool2d")(t, k, s, p),
            x,
            dtype,
            rng,
        )


def test_attention(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        lead, (n, m, d, e) = shape(rng, 2), (int(i) for i in rng.integers(1, 9, 4))
        scale = pick(rng, [None, float(rng.uniform(0.1, 1))])
        seen = np.ones((n, m), bool)
        causal = flip(rng)
        if causal:
            seen &= np.tri(n, m, m - n, dtype=bool)
        mask = rng.integers(0, 3, (*lead, n, m)) > 0 if flip(rng) else None
        seen = seen if mask is None else seen & mask

        def theirs(q: Any, k: Any, v: Any, seen: Array = seen, scale: Any = scale) -> torch.Tensor:
            where = torch.tensor(seen)
            y = their.scaled_dot_product_attention(q, k, v, attn_mask=where, scale=scale)
            return torch.where(where.any(-1, keepdim=True), y, 0)

        compare(
            lambda *a, m=mask, c=causal, s=scale: functional.attention(
                *a, mask=m, causal=c, scale=s
            ),
            theirs,
            normal(rng, (*lead, n, d), (*lead, m, d), (*lead, m, e)),
            dtype,
            rng,
        )


def test_self_attention(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        n, length, heads, each = shape(rng, 4)

        def theirs(x: Any, whole: tuple[int, ...] = (n, length, 3, heads, each)) -> torch.Tensor:
            q, k, v = x.reshape(whole).permute(2, 0, 3, 1, 4)
            y = their.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).reshape(*whole[:2], -1)

        compare(
            lambda x, heads=heads: functional.self_attention(x, heads, causal=True),
            theirs,
            normal(rng, (n, length, 3 * heads * each)),
            dtype,
            rng,
        )


def test_layer_norm(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        width = int(rng.integers(2, 30))
        compare(
            lambda *a: functional.layer_norm(*a, eps=1e-3),
            lambda x, *a: their.layer_norm(x, a[0].shape, *a, eps=1e-3),
            normal(rng, (*shape(rng), width), (width,), (width,)),
            dtype,
            rng,
        )


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(training: bool, dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        c, others = int(rng.integers(1, 6)), shape(rng)[:2]
        x, *rest = normal(rng, (5, c, *others), (c,), (c,))
        mean, var = rng.standard_normal(c).astype(dtype), rng.uniform(0.5, 2, c).astype(dtype)

        def ours(x: Tensor, w: Tensor, b: Tensor, mean: Any = mean, var: Any = var) -> Tensor:
            if not training:
                return functional.batch_norm(x, w, b, mean=mean, var=var)
            axes = (0, *range(2, x.ndim))
            mean, var = x.data.mean(axes), x.data.var(axes)
            return functional.batch_norm(x, w, b, mean=mean, var=var, count=x.size / x.shape[1])

        def theirs(x: Any, w: Any, b: Any, mean: Any = mean, var: Any = var) -> torch.Tensor:
            statistics = torch.tensor(mean), torch.tensor(var)
            return their.batch_norm(x, *statistics, w, b, training=training)

        compare(ours, theirs, [x, *rest], dtype, rng)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str, dtype: type, rng: Rng) -> None:
    for size in (1, 100, 100_003):
        x = rng.standard_normal(size) * 3
        compare(
            lambda t: functional.gelu(t, approximate),
            lambda t: their.gelu(t, approximate=approximate),
            [x],
            dtype,
            rng,
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float, dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        n, classes = map(int, rng.integers(1, 20, 2))
        labels = rng.integers(0, classes, n)
        compare(
            lambda x, t=labels: functional.cross_entropy(x, t, smoothing=smoothing),
            lambda x, t=labels: their.cross_entropy(x, torch.tensor(t), label_smoothing=smoothing),
            [5 * rng.standard_normal((n, classes))],
            dtype,
            rng,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (functional.binary_cross_entropy, their.binary_cross_entropy_with_logits),
        (functional.mse, their.mse_loss),
        (functional.l1, their.l1_loss),
    ],
    ids=["binary_cross_entropy", "mse", "l1"],
)
def test_losses(ours: Any, theirs: Any, reduction: str, dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        target = rng.uniform(0, 1, shape(rng)).astype(dtype)
        compare(
            lambda x, t=target: ours(x, t, reduction=reduction),
            lambda x, t=target: theirs(x, torch.tensor(t), reduction=reduction),
            [4 * rng.standard_normal(target.shape)],
            dtype,
            rng,
        )


def test_kl(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        x, target = normal(rng, *[shape(rng, 2)] * 2)
        p = (np.exp(target) / np.exp(target).sum(1, keepdims=True)).astype(dtype)
        compare(
            lambda t, p=p: functional.kl(functional.log_softmax(t), p),
            lambda t, p=p: their.kl_div(t.log_softmax(-1), torch.tensor(p), reduction="batchmean"),
            [x],
            dtype,
            rng,
        )


def test_embedding(dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        count, width = shape(rng, 2)
        indices = np.asarray(rng.integers(0, count, shape(rng)))
        compare(
            lambda w, i=indices: functional.embedding(i, w),
            lambda w, i=indices: their.embedding(torch.tensor(i), w),
            normal(rng, (count, width)),
            dtype,
            rng,
        )


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name: str, dtype: type, rng: Rng) -> None:
    for _ in range(ROUNDS):
        whole = shape(rng, 3)
        axis = int(rng.integers(-3, 3))
        compare(
            lambda x, axis=axis: getattr(functional, name)(x, axis),
            lambda x, axis=axis: getattr(their, name)(x, axis),
            [10 * rng.standard_normal(whole)],
            dtype,
            rng,
        )


@pytest.mark.parametrize("subscripts", [s for s in EINSUMS.split() if s != "i,->i"])
def test_einsum(subscripts: str, dtype: type, rng: Rng) -> None:
    lengths = dict(zip("abcdeijkl", shape(rng, 9), strict=True))
    dots = shape(rng, 2)
    arrays = []
    for term in subscripts.split("->")[0].split(","):
        before, found, after = term.partition("...")
        middle = dots[int(rng.integers(0, 3)) :] if found else ()
        whole = (*(lengths[c] for c in before), *middle, *(lengths[c] for c in after))
        arrays += normal(rng, whole)
    compare(
        lambda *xs: functional.einsum(subscripts, *xs),
        lambda *xs: torch.einsum(subscripts, *xs),
        arrays,
        dtype,
        rng,
    )


def test_a_small_network_of_all_kinds(dtype: type, rng: Rng) -> None:
    arrays = normal(rng, (3, 2, 8, 8), (4, 2, 3, 3), (4,), (5, 64), (5,))
    labels = rng.integers(0, 5, 3)

    def ours(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        y = functional.max_pool2d(functional.relu(functional.conv2d(x, w, b, padding=1)), 2)
        y = functional.linear(functional.gelu(y).reshape(3, -1), v, c)
        return functional.cross_entropy(y, labels)

    def theirs(x: Any, w: Any, b: Any, v: Any, c: Any) -> torch.Tensor:
        y = their.max_pool2d(their.relu(their.conv2d(x, w, b, padding=1)), 2)
        y = their.linear(their.gelu(y).reshape(3, -1), v, c)
        return their.cross_entropy(y, torch.tensor(labels))

    compare(ours, theirs, arrays, dtype, rng)
