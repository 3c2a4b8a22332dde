"""One table of all operations: a function of tensors, and fresh random arrays for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import nn
from mpidl.autograd import apply

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl import Tensor
    from mpidl.array import Array

    Case = tuple[Callable[..., Tensor], list[Array]]

Rng = np.random.Generator


def shape(rng: Rng, ndim: int | None = None) -> tuple[int, ...]:
    """Return a random shape of `ndim` axes, 0 to 3 by default, each of 1 to 4 elements."""
    return tuple(map(int, rng.integers(1, 5, rng.integers(0, 4) if ndim is None else ndim)))


def values(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Return values of both signs, of size 0.1 to 2: away from 0, where |x| and 1/x have kinks."""
    return np.asarray(rng.uniform(0.1, 2, shape) * rng.choice([-1, 1], shape))


def broadcast_pair(rng: Rng) -> list[Array]:
    """Return two arrays, either of which may be stretched along some axes."""
    whole = shape(rng)
    stretched = [tuple(int(n) if keep else 1 for n, keep in _choices(rng, whole)) for _ in range(2)]
    short = stretched[0][int(rng.integers(0, len(whole) + 1)) :]
    pair = [values(rng, short), values(rng, stretched[1])]
    return pair if rng.integers(2) else pair[::-1]


def _choices(rng: Rng, whole: tuple[int, ...]) -> list[tuple[int, bool]]:
    return list(zip(whole, rng.integers(0, 2, len(whole)), strict=True))


def one(function: Callable[[Tensor], Tensor]) -> Callable[[Rng], Case]:
    return lambda rng: (function, [values(rng, shape(rng))])


def two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Rng], Case]:
    return lambda rng: (function, broadcast_pair(rng))


def loss(function: Callable[[Tensor, Array], Tensor]) -> Callable[[Rng], Case]:
    def make(rng: Rng) -> Case:
        target = values(rng, shape(rng))
        return lambda x: function(x, target), [np.asarray(target + values(rng, target.shape))]

    return make


def power(rng: Rng) -> Case:
    exponent = float(rng.uniform(-3, 3))
    return lambda x: x**exponent, [np.asarray(np.abs(values(rng, shape(rng))))]


def log(rng: Rng) -> Case:
    return lambda x: x.log(), [np.asarray(np.abs(values(rng, shape(rng))))]


def matmul(rng: Rng) -> Case:
    n, k, m = shape(rng, 3)
    return lambda x, y: x @ y, [values(rng, (n, k)), values(rng, (k, m))]


def linear(rng: Rng) -> Case:
    n, k, m = shape(rng, 3)
    arrays = [values(rng, s) for s in ((n, k), (m, k), (m,))]
    return lambda *a: apply("linear", *a), arrays[: int(rng.integers(2, 4))]  # with or without bias


def getitem(rng: Rng) -> Case:
    n, m = shape(rng, 2)
    keys: list[Any] = [
        int(rng.integers(n)),
        slice(None, None, -1),
        (slice(0, n, 2), slice(None)),
        (Ellipsis, None, 0),
        rng.integers(0, n, 7),  # elements picked more than once
        rng.integers(0, 2, (n, m)).astype(bool),
        (rng.integers(0, n, 5), rng.integers(0, m, 5)),
    ]
    key = keys[int(rng.integers(len(keys)))]
    return lambda x: x[key], [values(rng, (n, m))]


def reshape(rng: Rng) -> Case:
    x = values(rng, shape(rng))
    target = [(-1,), x.shape[::-1], (x.size, 1)][int(rng.integers(3))]
    return lambda t: t.reshape(*target), [x]


def total(rng: Rng) -> Case:
    x = values(rng, shape(rng, 3))
    axes = [None, 0, -1, (0, 2), (-2,), (0, 1, 2), ()]
    axis = axes[int(rng.integers(len(axes)))]
    keepdims = bool(rng.integers(2))
    return lambda t: t.sum(axis, keepdims=keepdims), [x]


def cross_entropy(rng: Rng) -> Case:
    n, classes = shape(rng, 2)
    labels = rng.integers(0, classes, n)
    return lambda x: nn.cross_entropy(x, labels), [values(rng, (n, classes))]


CASES: dict[str, Callable[[Rng], Case]] = {
    "add": two(lambda x, y: x + y),
    "cross_entropy": cross_entropy,
    "divide": two(lambda x, y: x / y),
    "exp": one(lambda x: x.exp()),
    "getitem": getitem,
    "l1": loss(nn.l1),
    "linear": linear,
    "log": log,
    "matmul": matmul,
    "mse": loss(nn.mse),
    "multiply": two(lambda x, y: x * y),
    "negative": one(lambda x: -x),
    "power": power,
    "relu": one(lambda x: apply("relu", x)),
    "reshape": reshape,
    "sigmoid": one(lambda x: apply("sigmoid", x)),
    "subtract": two(lambda x, y: x - y),
    "sum": total,
    "tanh": one(lambda x: apply("tanh", x)),
    "transpose": one(lambda x: x.T),
}
