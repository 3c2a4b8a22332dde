"""One table of all operations: a function of tensors, and fresh random arrays for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional
from mpidl.autograd import apply
from tests.unit import operations_nn as large
from tests.unit.draws import (
    Rng,
    broadcast_shapes,
    distinct,
    flip,
    pick,
    positive,
    shape,
    some_shape,
    values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl import Tensor
    from mpidl.array import Array

    Case = tuple[Callable[..., Tensor], list[Array]]


def one(name: str, make: Callable[..., Array] = values, **options: Any) -> Callable[[Rng], Case]:
    def case(rng: Rng) -> Case:
        return lambda x: apply(name, x, **options), [make(rng, some_shape(rng))]

    return case


def two(name: str, make: Callable[..., Array] = values) -> Callable[[Rng], Case]:
    def case(rng: Rng) -> Case:
        return lambda x, y: apply(name, x, y), [make(rng, s) for s in broadcast_shapes(rng)]

    return case


def choice(name: str) -> Callable[[Rng], Case]:
    """Of two arrays that have no values in common."""

    def case(rng: Rng) -> Case:
        first, second = broadcast_shapes(rng)
        arrays = [distinct(rng, first), distinct(rng, second, offset=0.1)]
        return lambda x, y: apply(name, x, y), arrays

    return case


def along(name: str, make: Callable[..., Array] = values) -> Callable[[Rng], Case]:
    """Along one axis, which stays."""

    def case(rng: Rng) -> Case:
        x = make(rng, shape(rng, int(rng.integers(1, 4))))
        axis = int(rng.integers(-x.ndim, x.ndim))
        return lambda t: apply(name, t, axis=axis), [x]

    return case


def reduction(name: str, make: Callable[..., Array] = values) -> Callable[[Rng], Case]:
    def case(rng: Rng) -> Case:
        x = make(rng, shape(rng, 3))
        axis = pick(rng, [None, 0, -1, (0, 2), (-2,), (0, 1, 2), ()])
        options: dict[str, Any] = {"axis": axis, "keepdims": flip(rng)}
        if name == "var":
            count = x.size if axis is None else np.prod([x.shape[a] for a in np.atleast_1d(axis)])
            options["correction"] = pick(rng, [0, 0.5, int(count > 1)])
        return lambda t: apply(name, t, **options), [x]

    return case


def power(rng: Rng) -> Case:
    if flip(rng):
        exponent = pick(rng, [float(rng.uniform(-3, 3)), 0, 1, 2, 3, -1])
        return lambda x: x**exponent, [positive(rng, some_shape(rng))]
    return lambda x, y: x**y, [positive(rng, s) for s in broadcast_shapes(rng)]


def clip(rng: Rng) -> Case:
    low, high = pick(rng, [(-0.3, 0.4), (None, 0.1), (-0.1, None), (-9.0, 9.0)])
    return lambda x: x.clip(low, high), [distinct(rng, some_shape(rng))]


def where(rng: Rng) -> Case:
    arrays = [values(rng, s) for s in broadcast_shapes(rng)]
    whole = np.broadcast_shapes(*(a.shape for a in arrays))
    condition = rng.integers(0, 2, (*shape(rng, 1), *whole) if flip(rng) else whole).astype(bool)
    return lambda x, y: functional.where(condition, x, y), arrays


def dropout(rng: Rng) -> Case:
    x = values(rng, shape(rng))
    mask = np.asarray(rng.integers(0, 2, x.shape) / 0.5)
    return lambda t: functional.dropout(t, mask.astype(t.dtype)), [x]


def astype(rng: Rng) -> Case:
    dtype = pick(rng, [np.float64, np.longdouble])
    return lambda x: x.astype(dtype), [values(rng, some_shape(rng))]


def matmul(rng: Rng) -> Case:
    n, k, m = shape(rng, 3)
    left, right = broadcast_shapes(rng)
    shapes = [
        ((n, k), (k, m)),
        ((n, k), (k,)),
        ((k,), (k, m)),
        ((k,), (k,)),
        ((*left, n, k), (*right, k, m)),
        ((*left, n, k), (k,)),
        ((k,), (*right, k, m)),
        ((0, k), (k, m)),
    ]
    return lambda x, y: x @ y, [values(rng, s) for s in pick(rng, shapes)]


def linear(rng: Rng) -> Case:
    lead, (k, m) = pick(rng, [(), (0,), shape(rng)]), shape(rng, 2)
    arrays = [values(rng, s) for s in ((*lead, k), (m, k), (m,))]
    return lambda *a: apply("linear", *a), arrays[: int(rng.integers(2, 4))]  # with or without bias


#: an ellipsis stands for up to two axes, each of which may be stretched
EINSUMS = """
    ij,jk->ik  ij,jk  ba,cb  bij,bjk->bik  ...ij,...jk->...ik  ...ij,...jk  i...,i...->...
    a...b,b->a...  ii->i  ii  iij->j  ijij->ij  iii->i  ii,ij->j  ij->  ij->ji  i,i  i,j->ij
    ij,kl->jl  ijk,k->i  abc,cd,de->ae  ...i->...  ...ii->...i  ij,ij,ij->i  ...,...  i,->i
"""


def einsum(rng: Rng) -> Case:
    subscripts = pick(rng, EINSUMS.split())
    lengths = dict(zip("abcdeijkl", shape(rng, 9), strict=True))
    arrays = []
    for term, dots in zip(subscripts.split("->")[0].split(","), broadcast_shapes(rng) * 2):  # noqa: B905
        before, _, after = term.partition("...")
        middle = dots[-2:] if "..." in term else ()
        whole = (*map(lengths.get, before), *middle, *map(lengths.get, after))
        arrays.append(values(rng, whole))
    return lambda *xs: functional.einsum(subscripts, *xs), arrays


def getitem(rng: Rng) -> Case:
    n, m = shape(rng, 2)
    keys: list[Any] = [
        int(rng.integers(-n, n)),
        slice(None, None, -1),
        slice(n, None),
        (slice(0, n, 2), slice(None)),
        (Ellipsis, None, 0),
        rng.integers(-n, n, 7),  # elements picked more than once, also from the end
        rng.integers(-n, n, (2, 3)),
        rng.integers(0, n, 0),
        list(map(int, rng.integers(-n, n, 3))),
        rng.integers(0, 2, n).astype(bool),
        rng.integers(0, 2, (n, m)).astype(bool),
        (rng.integers(-n, n, 5), rng.integers(0, m, 5)),
        (slice(None), rng.integers(-m, m, 5)),
        (rng.integers(0, n, 3), None, slice(None, None, -1)),
    ]
    key = pick(rng, keys)
    return lambda x: x[key], [values(rng, (n, m))]


def reshape(rng: Rng) -> Case:
    x = values(rng, shape(rng))
    target = pick(rng, [(-1,), x.shape[::-1], (x.size, 1)])
    return lambda t: t.reshape(*target), [x]


def transpose(rng: Rng) -> Case:
    x = values(rng, some_shape(rng))
    axes = tuple(int(a) - x.ndim * flip(rng) for a in rng.permutation(x.ndim))
    return (lambda t: t.transpose(*axes)) if flip(rng) else (lambda t: t.T), [x]


def broadcast(rng: Rng) -> Case:
    short, other = broadcast_shapes(rng)
    whole = np.broadcast_shapes(short, other)
    return lambda x: functional.broadcast_to(x, whole), [values(rng, short)]


def joined(name: str) -> Callable[[Rng], Case]:
    def case(rng: Rng) -> Case:
        whole = shape(rng, int(rng.integers(1, 4)))
        axis, each = int(rng.integers(-len(whole), len(whole))), []
        for _ in range(int(rng.integers(1, 4))):
            lengths = list(whole)
            if name == "concatenate":
                lengths[axis] = int(rng.integers(0, 4))
            each.append(values(rng, tuple(lengths)))
        return lambda *xs: apply(name, *xs, axis=axis), each

    return case


def pad(rng: Rng) -> Case:
    x = values(rng, some_shape(rng))
    widths = [tuple(map(int, pair)) for pair in rng.integers(0, 3, (x.ndim, 2))]
    value = float(rng.uniform(-1, 1))
    return lambda t: functional.pad(t, widths, value), [x]


CASES: dict[str, Callable[[Rng], Case]] = {
    "abs": one("abs"),
    "add": two("add"),
    "astype": astype,
    "attention": large.attention,
    "avg_pool2d": large.pool("avg_pool2d"),
    "batch_norm": large.batch_norm,
    "binary_cross_entropy": large.loss(functional.binary_cross_entropy),
    "broadcast": broadcast,
    "clip": clip,
    "concatenate": joined("concatenate"),
    "conv2d": large.conv2d,
    "cos": one("cos"),
    "cross_entropy": large.cross_entropy,
    "divide": two("divide"),
    "dropout": dropout,
    "einsum": einsum,
    "embedding": large.embedding,
    "exp": one("exp"),
    "gelu": lambda rng: one("gelu", approximate=pick(rng, ["none", "tanh"]))(rng),
    "getitem": getitem,
    "kl": large.loss(functional.kl, reductions=False),
    "l1": large.loss(functional.l1),
    "layer_norm": large.layer_norm,
    "leaky_relu": lambda rng: one("leaky_relu", slope=float(rng.uniform(-1, 1)))(rng),
    "linear": linear,
    "log": one("log", positive),
    "log_softmax": along("log_softmax"),
    "matmul": matmul,
    "max": reduction("max", distinct),
    "max_pool2d": large.pool("max_pool2d"),
    "maximum": choice("maximum"),
    "mean": reduction("mean"),
    "min": reduction("min", distinct),
    "minimum": choice("minimum"),
    "mse": large.loss(functional.mse),
    "multiply": two("multiply"),
    "negative": one("negative"),
    "pad": pad,
    "power": power,
    "relu": one("relu"),
    "reshape": reshape,
    "self_attention": large.self_attention,
    "sigmoid": one("sigmoid"),
    "sin": one("sin"),
    "softmax": along("softmax"),
    "sqrt": one("sqrt", positive),
    "stack": joined("stack"),
    "subtract": two("subtract"),
    "sum": reduction("sum"),
    "tanh": one("tanh"),
    "threshold": lambda rng: one("threshold", distinct, threshold=0.1, value=rng.normal())(rng),
    "to": one("to", device="cpu"),
    "transpose": transpose,
    "var": reduction("var"),
    "where": where,
}
