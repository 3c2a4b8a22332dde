"""Every operation's converter: the file gives what the operation gives, in both runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import functional as F  # noqa: N812
from mpidl.autograd import OPS, apply
from mpidl.onnx.converters import CONVERTERS
from tests.unit.onnx_runtimes import Apply, expect_agreement

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpidl import Tensor
    from mpidl.array import Array

    Case = tuple[Callable[..., Any], Callable[[int], tuple[Array, ...]]]

Rng = np.random.Generator


def floats(rng: Rng, *shape: int) -> Array:
    return np.asarray(rng.uniform(0.2, 2, shape) * rng.choice([-1, 1], shape), np.float32)


def sizes(rng: Rng, count: int, least: int = 2) -> list[int]:
    return [int(n) for n in rng.integers(least, 6, count)]


def one(function: Callable[[Tensor], Any], *, ndim: int = 3, positive: bool = False) -> Any:
    """Return the case of a function of one array (n, ...)."""

    def make(rng: Rng) -> Case:
        rest = sizes(rng, ndim - 1)

        def batch(n: int) -> tuple[Array, ...]:
            x = floats(rng, n, *rest)
            return (np.abs(x) if positive else x,)

        return function, batch

    return make


def two(name: str, *, positive: bool = False) -> list[Any]:
    """Return cases of two arrays, of an array and a number, and of an array and a row."""

    def arrays(rng: Rng) -> Case:
        a, b = sizes(rng, 2)

        def batch(n: int) -> tuple[Array, ...]:
            x = floats(rng, n, a, 1)
            return np.abs(x) if positive else x, floats(rng, n, 1, b)

        return lambda x, y: apply(name, x, y), batch

    def number(rng: Rng) -> Case:
        value = float(rng.uniform(0.5, 2))
        return one(lambda x: apply(name, x, value), positive=positive)(rng)

    def scalar(rng: Rng) -> Case:
        value = np.float64(rng.uniform(0.5, 2))
        return one(lambda x: apply(name, value, x))(rng)

    def row(rng: Rng) -> Case:
        width = sizes(rng, 1)[0]
        constant = floats(rng, width)
        function = lambda x: apply(name, x, constant)  # noqa: E731
        x = lambda n: floats(rng, n, 2, width)  # noqa: E731
        return function, lambda n: (np.abs(x(n)) if positive else x(n),)

    return [arrays, number, scalar, row]


def picked(key: Any) -> Any:
    """Return the case of indexing (n, 4, 5, 6)."""

    def make(rng: Rng) -> Case:
        fixed = key(rng) if callable(key) else key
        return lambda x: x[fixed], lambda n: (floats(rng, n, 4, 5, 6),)

    return make


def by_input(function: Callable[..., Any], high: int) -> Any:
    """Return the case of indexing x (n, 4, 5) by integers (n,) of another input."""
    return lambda rng: (
        function,
        lambda n: (floats(rng, n, 4, 5), rng.integers(-high, high, n)),
    )


def matrices(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """Return the case of several inputs of these shapes, where -1 stands for the batch."""

    def make(rng: Rng) -> Case:
        return function, lambda n: tuple(
            floats(rng, *(n if size == -1 else size for size in shape)) for shape in shapes
        )

    return make


def weighted(function: Callable[..., Any], x: tuple[int, ...], *shapes: tuple[int, ...]) -> Any:
    """Return the case of an input (n, *x), and constants of `shapes`."""

    def make(rng: Rng) -> Case:
        constants = [floats(rng, *shape) for shape in shapes]
        return lambda t: function(t, *constants), lambda n: (floats(rng, n, *x),)

    return make


def loss(function: Callable[..., Any], target: Callable[[Array], Array] = lambda t: t) -> Any:
    def make(rng: Rng) -> Case:
        width = sizes(rng, 1)[0]
        return function, lambda n: (floats(rng, n, width), target(floats(rng, n, width)))

    return make


def labelled(smoothing: float) -> Any:
    return lambda rng: (
        lambda x, labels: F.cross_entropy(x, labels, smoothing=smoothing),
        lambda n: (floats(rng, n, 5), rng.integers(0, 5, n)),
    )


def rows(kind: Any) -> Any:
    def make(rng: Rng) -> Case:
        weight = floats(rng, 7, 3)
        return (
            lambda x: F.embedding(x, weight),
            lambda n: (rng.integers(0, 7, (n, 4)).astype(kind),),
        )

    return make


def attention(shapes: tuple[tuple[int, ...], ...], **options: Any) -> Any:
    return matrices(lambda q, k, v: F.attention(q, k, v, **options), *shapes)


def masked(rng: Rng) -> Case:
    """Attention under a mask that is an input; the first query of the first sample sees nothing."""

    def batch(n: int) -> tuple[Array, ...]:
        mask = rng.random((n, 3, 4)) < 0.6
        mask[0, 0] = False
        return floats(rng, n, 3, 4), floats(rng, n, 4, 4), floats(rng, n, 4, 4), mask

    return lambda q, k, v, mask: F.attention(q, k, v, mask=mask), batch


def padded(rng: Rng) -> Case:
    """Self-attention under a mask of keys, whose axes the model adds."""

    def batch(n: int) -> tuple[Array, ...]:
        return floats(rng, n, 3, 12), rng.random((n, 3)) < 0.7

    def function(x: Tensor, mask: Array) -> Tensor:
        return F.self_attention(x, 2, mask=mask[:, None, None, :], causal=True)

    return function, batch


def chosen(rng: Rng) -> Case:
    def batch(n: int) -> tuple[Array, ...]:
        return rng.random((n, 3)) < 0.5, floats(rng, n, 3)

    # the condition is the second input: the first is the one whose length is the batch
    return lambda c, x: F.where(c, x, -1.5), batch


QKV = ((-1, 3, 4), (-1, 5, 4), (-1, 5, 4))
EQUATIONS = [
    ("nij,njk->nik", (-1, 2, 3), (-1, 3, 4)),
    ("...i,...i->...", (-1, 2, 3), (-1, 2, 3)),
    ("nij,nkj", (-1, 2, 3), (-1, 4, 3)),
    ("nij->nj", (-1, 2, 3)),
    ("...ij,...jk->...ik", (-1, 2, 4), (4, 5)),
    ("n...ij,...j", (-1, 1, 2, 4), (6, 4)),
    ("n...i,...i->n", (-1, 2, 5), (5,)),
    ("nii->ni", (-1, 3, 3)),
    ("n...,n...->n", (-1, 2, 3), (-1, 2, 3)),
    ("ni,nj,nk->nijk", (-1, 2), (-1, 3), (-1, 4)),
]
KEYS: list[Any] = [
    0,
    -1,
    (slice(None), 2),
    (slice(None), -1, slice(1, 4)),
    (Ellipsis, slice(None, None, -1)),
    (slice(None), slice(-3, None, 2), None, Ellipsis, 0),
    (slice(1, None),),
    (slice(None), slice(-9, 9), slice(3, 0, -2)),
    None,
    lambda rng: (slice(None), rng.integers(-4, 4, (2, 3))),
    lambda rng: (slice(None), list(map(int, rng.integers(0, 4, 3))), slice(1, 3)),
    lambda rng: (slice(None), rng.integers(-4, 4, 3), rng.integers(0, 5, 3)),
    lambda rng: (slice(None), rng.integers(0, 4, 3), slice(0, 2), rng.integers(-6, 6, (2, 1))),
    lambda rng: (slice(None), 1, slice(None), rng.integers(0, 6, 3)),
    lambda rng: (slice(None), None, rng.integers(0, 4, 3), 2),
    (slice(None), np.array([True, False, True, True])),
    lambda rng: (slice(None), rng.permutation(20).reshape(4, 5) < 7),
    lambda rng: (slice(None), rng.integers(0, 4, 2), Ellipsis, rng.integers(0, 5, 2), slice(None)),
]
POOLS = [(2, None, 0), ((3, 2), (2, 1), (1, 0)), (3, 1, 1)]
CONVS = [
    {},
    {"stride": 2, "padding": (1, 2)},
    {"dilation": (2, 1), "padding": 1},
    {"groups": 2, "stride": (1, 2)},
]

CASES: dict[str, list[Any]] = {
    "abs": [one(lambda x: x.abs())],
    "add": two("add"),
    "astype": [one(lambda x: x.astype(np.float64) * 2), one(lambda x: x.astype(np.float32))],
    "attention": [
        attention(QKV),
        attention(QKV, causal=True, scale=0.3),
        attention(((-1, 5, 4), (-1, 3, 4), (-1, 3, 4)), causal=True),  # two queries see nothing
        attention(tuple((-1, 2, *s[1:]) for s in QKV), mask=np.tri(3, 5, 1, dtype=bool)),
        attention(QKV, drop=np.full((3, 5), 0.5, np.float32)),
        attention(((-1, 4), (5, 4), (5, 4))),
        masked,
    ],
    "avg_pool2d": [
        weighted(lambda x, p=p: F.avg_pool2d(x, p[0], stride=p[1], padding=p[2]), (2, 7, 6))
        for p in POOLS
    ],
    "batch_norm": [
        weighted(
            lambda x, w, b, m, v: F.batch_norm(x, w, b, mean=m, var=np.abs(v), eps=0.01),
            shape,
            *[(3,)] * 4,
        )
        for shape in [(3,), (3, 4), (3, 4, 2)]
    ],
    "binary_cross_entropy": [
        loss(F.binary_cross_entropy, lambda t: np.abs(t) / 2),
        loss(lambda x, t: F.binary_cross_entropy(x * 40, t, reduction="sum"), lambda t: t > 0),
    ],
    "broadcast": [
        weighted(lambda x: F.broadcast_to(x, (2, x.shape[0], 3, 4)), (1, 4)),
        weighted(lambda x, w: F.broadcast_to(w, (len(x), 2, 3)) * x, (2, 3), (1, 3)),
    ],
    "clip": [
        one(lambda x: x.clip(-0.5, 1)),
        one(lambda x: x.clip(high=0.3)),
        one(lambda x: x.clip(low=0.1)),
    ],
    "concatenate": [
        matrices(lambda *xs: F.concatenate(xs, 1), (-1, 2, 3), (-1, 1, 3), (-1, 4, 3)),
        one(lambda x: F.concatenate([x, x * 2], -1)),
        one(lambda x: F.concatenate([x, x[1:]], 0)),
    ],
    "conv2d": [
        weighted(lambda x, *w, o=o: F.conv2d(x, *w, **o), (2, 7, 6), (4, 2 // g, 3, 2), *bias)
        for o in CONVS
        for g in [o.get("groups", 1)]
        for bias in [[(4,)], []]
    ],
    "cos": [one(F.cos)],
    "cross_entropy": [labelled(0.0), labelled(0.2)],
    "divide": two("divide"),
    "dropout": [weighted(F.dropout, (2, 3), (3,))],
    "einsum": [matrices(lambda *xs, e=e: F.einsum(e, *xs), *shapes) for e, *shapes in EQUATIONS],
    "embedding": [rows(kind) for kind in (np.int64, np.int32, np.uint8)],
    "exp": [one(lambda x: x.exp())],
    "gelu": [one(F.gelu), one(lambda x: F.gelu(x * 3, "tanh"))],
    "getitem": [
        *map(picked, KEYS),
        by_input(lambda x, i: x[:, i], 4),
        by_input(lambda x, i: x[np.arange(len(x)), i], 4),
        one(lambda x: x[len(x) - 1]),
        one(lambda x: x[: 2 * len(x) - 1]),
    ],
    "kl": [loss(lambda x, t: F.kl(F.log_softmax(x), t), lambda t: np.maximum(t, 0))],
    "l1": [loss(F.l1), loss(lambda x, t: F.l1(x, t, reduction="sum"))],
    "layer_norm": [
        weighted(F.layer_norm, (2, 5), (5,), (5,)),
        weighted(lambda x, w, b: F.layer_norm(x, w, b, eps=0.3), (4,), (4,), (4,)),
    ],
    "leaky_relu": [one(lambda x: F.leaky_relu(x, 0.3))],
    "linear": [
        weighted(F.linear, shape, (5, 4), *bias)
        for shape in [(4,), (3, 4), (2, 3, 4)]
        for bias in [[(5,)], []]
    ],
    "log": [one(lambda x: x.log(), positive=True)],
    "log_softmax": [one(F.log_softmax), one(lambda x: F.log_softmax(x * 50, 1))],
    "matmul": [
        matrices(F.matmul, (-1, 2, 3), (-1, 3, 4)),
        matrices(F.matmul, (-1, 2, 1, 2, 3), (-1, 1, 3, 3, 4)),
        weighted(F.matmul, (3,), (3,)),
        weighted(lambda x, w: w @ x, (3, 2), (3,)),
    ],
    "max": [one(lambda x: x.max()), one(lambda x: x.max(-1)), one(lambda x: x.max((0, 2)))],
    "max_pool2d": [
        weighted(lambda x, p=p: F.max_pool2d(x, p[0], stride=p[1], padding=p[2]), (2, 7, 6))
        for p in POOLS
    ],
    "maximum": two("maximum"),
    "mean": [
        one(lambda x: x.mean()),
        one(lambda x: x.mean(0)),
        one(lambda x: x.mean((1, -1), keepdims=True)),
    ],
    "min": [one(lambda x: x.min()), one(lambda x: x.min(1, keepdims=True))],
    "minimum": two("minimum"),
    "mse": [loss(F.mse), loss(lambda x, t: F.mse(x, t, reduction="sum"))],
    "multiply": two("multiply"),
    "negative": [one(lambda x: -x)],
    "pad": [
        one(lambda x: F.pad(x, [(0, 0), (1, 0), (2, 3)])),
        one(lambda x: F.pad(x, [(1, 2), (0, 0), (0, 1)], 1.5)),
    ],
    "power": [*two("power", positive=True), one(lambda x: x**2), one(lambda x: x**3)],
    "relu": [one(F.relu)],
    "reshape": [
        weighted(lambda x: x.reshape(len(x), -1), (2, 6)),
        weighted(lambda x: x.reshape(-1, 4), (2, 6)),
        weighted(lambda x: x.reshape(len(x) * 3, 2, 2), (2, 6)),
        weighted(lambda x: x.reshape(2, 6, len(x)), (2, 6)),
        weighted(lambda x: F.broadcast_to(x, (x.shape[0],) * 2).reshape(-1), ()),
        weighted(lambda x: F.broadcast_to(x, (len(x), len(x), 2)).reshape(len(x), 2, len(x)), (2,)),
        weighted(lambda x: (x * 2).sum().reshape(1, 1), (2,)),
    ],
    "self_attention": [
        weighted(lambda x, o=o: F.self_attention(x, 2, **o), (4, 12))
        for o in [{}, {"causal": True}, {"mask": np.eye(4, dtype=bool)[::-1]}]
    ]
    + [padded],
    "sigmoid": [one(lambda x: F.sigmoid(x * 20))],
    "sin": [one(F.sin)],
    "softmax": [one(F.softmax), one(lambda x: F.softmax(x * 50, 0))],
    "sqrt": [one(lambda x: x.sqrt(), positive=True)],
    "stack": [
        one(lambda x: F.stack([x, x * 2], -1)),
        one(lambda x: F.stack([x, x * 2, x], 0)),
    ],
    "subtract": two("subtract"),
    "sum": [
        one(lambda x: x.sum()),
        one(lambda x: x.sum(0, keepdims=True)),
        one(lambda x: x.sum((-1, 1))),
        one(lambda x: x.sum(())),
        one(lambda x: x.sum(0) / len(x)),
    ],
    "tanh": [one(F.tanh)],
    "threshold": [one(lambda x: F.threshold(x, 0.5, -3))],
    "to": [one(lambda x: x.to("cpu") * 2)],
    "transpose": [
        one(lambda x: x.T),
        one(lambda x: x.transpose(1, -1, 0)),
    ],
    "var": [
        one(lambda x: x.var()),
        one(lambda x: x.var(-1, keepdims=True)),
        one(lambda x: x.var((0, 1), correction=1)),
        one(lambda x: x.var(2, correction=0.5)),
    ],
    "where": [
        chosen,
        weighted(lambda x, y: F.where(y > 0, x, y), (2, 3), (3,)),
    ],
}


def test_each_operation_has_a_converter_and_a_case() -> None:
    assert set(CONVERTERS) == set(OPS) == set(CASES)


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
)
def test_the_file_gives_what_the_operation_gives(
    name: str, number: int, rng: Rng, tmp_path: Path
) -> None:
    function, make = CASES[name][number](rng)
    batches = (2, 3, 5) if (name, number) == ("var", 2) else (1, 3, 5)
    expect_agreement(Apply(function), tmp_path / "model.onnx", make, batches=batches)
