"""The operations: each computes its value and, beside it, the adjoint to every input.

An operation takes arrays (or numbers) and returns `value, adjoints`. An adjoint is called as
`adjoint(gradient, out)`: `gradient` has the shape of the value, the result that of the input.
It may write its result into `out` and return `out`, so that a parameter's gradient is born in
its bucket, or ignore `out` (None where nobody offers memory).

`OPS` at the end is the one table of all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mpidl.array import is_array, namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

Adjoint: TypeAlias = "Callable[[Array, Array | None], Array]"
Result: TypeAlias = "tuple[Any, tuple[Adjoint, ...]]"


def _fit(gradient: Array, x: Any) -> Array:
    """Sum `gradient` over the axes along which `x` was broadcast to its shape."""
    shape = np.shape(x)
    if gradient.shape == shape:
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=stretched, keepdims=True) if stretched else gradient


def negative(x: Array) -> Result:
    """-x."""
    return -x, (lambda g, out: -g,)


def add(x: Array, y: Array) -> Result:
    """x + y, broadcast."""
    return x + y, (lambda g, out: _fit(g, x), lambda g, out: _fit(g, y))


def subtract(x: Array, y: Array) -> Result:
    """x - y, broadcast."""
    return x - y, (lambda g, out: _fit(g, x), lambda g, out: _fit(-g, y))


def multiply(x: Array, y: Array) -> Result:
    """x * y, broadcast."""
    return x * y, (lambda g, out: _fit(g * y, x), lambda g, out: _fit(g * x, y))


def divide(x: Array, y: Array) -> Result:
    """x / y, broadcast."""
    return x / y, (lambda g, out: _fit(g / y, x), lambda g, out: _fit(-g * x / (y * y), y))


def power(x: Array, *, exponent: float) -> Result:
    """x to a fixed power."""
    if exponent == 0:  # also at x = 0
        return x**0, (lambda g, out: g * 0,)
    return x**exponent, (lambda g, out: g * (exponent * x ** (exponent - 1)),)


def exp(x: Array) -> Result:
    """e to the power of x."""
    y = namespace(x).exp(x)
    return y, (lambda g, out: g * y,)


def log(x: Array) -> Result:
    """Natural logarithm."""
    return namespace(x).log(x), (lambda g, out: g / x,)


def relu(x: Array) -> Result:
    """max(x, 0); its derivative at 0 is 0."""
    y = namespace(x).maximum(x, 0)
    return y, (lambda g, out: g * (y > 0),)


def sigmoid(x: Array) -> Result:
    """1 / (1 + exp(-x)), through tanh, which never overflows."""
    y = namespace(x).tanh(x * 0.5) * 0.5 + 0.5
    return y, (lambda g, out: g * y * (1 - y),)


def tanh(x: Array) -> Result:
    """Hyperbolic tangent."""
    y = namespace(x).tanh(x)
    return y, (lambda g, out: g * (1 - y * y),)


def matmul(x: Array, y: Array) -> Result:
    """Matrix product of two 2-D arrays, (n, k) @ (k, m)."""
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError("expected two 2-D arrays")
    xp = namespace(x)
    return x @ y, (
        lambda g, out: xp.matmul(g, y.T, out=out),
        lambda g, out: xp.matmul(x.T, g, out=out),
    )


def linear(x: Array, weight: Array, bias: Array | None = None) -> Result:
    """x (..., k) @ weight (m, k).T + bias (m,) = (..., m): one product, the bias added in place."""
    xp = namespace(weight)
    inputs, outputs = weight.shape[1], weight.shape[0]
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"expected an input of shape (..., {inputs})")
    if x.dtype != weight.dtype:
        raise ValueError(f"input of dtype {x.dtype}, weights of {weight.dtype}: convert the input")
    rows = x.reshape(math.prod(x.shape[:-1]), inputs)
    y = rows @ weight.T
    if bias is not None:
        y += bias
    adjoints: tuple[Adjoint, ...] = (
        lambda g, out: xp.matmul(g, weight, out=out),
        lambda g, out: xp.matmul(g.reshape(len(rows), outputs).T, rows, out=out),
        lambda g, out: xp.sum(g.reshape(len(rows), outputs), axis=0, out=out),
    )
    return y.reshape(*x.shape[:-1], outputs), adjoints[: 2 if bias is None else 3]


def getitem(x: Array, *, key: Any) -> Result:
    """x[key] with NumPy's rules; elements picked twice get both gradients."""

    def adjoint(g: Array, out: Array | None) -> Array:
        xp = namespace(x)
        back = xp.zeros_like(x)
        xp.add.at(back, key, g)
        return back

    return x[key], (adjoint,)


def reshape(x: Array, *, shape: tuple[int, ...]) -> Result:
    """The same elements in another shape."""
    return x.reshape(shape), (lambda g, out: g.reshape(x.shape),)


def transpose(x: Array) -> Result:
    """All axes reversed."""
    return x.T, (lambda g, out: g.T,)


def total(x: Array, *, axis: int | tuple[int, ...] | None, keepdims: bool) -> Result:
    """Sum along axes."""

    def adjoint(g: Array, out: Array | None) -> Array:
        if axis is not None and not keepdims:
            g = namespace(g).expand_dims(g, axis)
        return namespace(g).broadcast_to(g, x.shape)

    return x.sum(axis=axis, keepdims=keepdims), (adjoint,)


def cross_entropy(logits: Array, *, labels: Array) -> Result:
    """Mean over n samples of -log softmax(logits (n, classes))[label]; 0 for n = 0.

    Labels are checked against the number of classes on the CPU only: a GPU would have to wait.
    """
    xp = namespace(logits)
    if not is_array(labels) or labels.dtype.kind not in "iu":
        found = labels.dtype if is_array(labels) else type(labels).__name__
        raise ValueError(f"expected labels as an array of integers, got {found}")
    n = len(logits)
    if logits.ndim != 2 or labels.shape != (n,):
        raise ValueError(f"expected logits (n, classes) and labels (n,), got labels {labels.shape}")
    if xp is np and n and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes"
        )
    shifted = logits - logits.max(axis=1, keepdims=True) if n else logits
    exps = xp.exp(shifted)
    sums = exps.sum(axis=1, keepdims=True)
    rows = xp.arange(n)
    losses = xp.log(sums[:, 0]) - shifted[rows, labels]

    def adjoint(g: Array, out: Array | None) -> Array:
        softmax = exps / sums
        softmax[rows, labels] -= 1
        softmax *= g / max(1, n)
        return softmax

    return losses.sum() / max(1, n), (adjoint,)


def mse(x: Array, *, target: Array) -> Result:
    """Mean of (x - target)^2 over all elements; 0 where there is none."""
    difference = x - _like(x, target)
    n = max(1, x.size)
    return (difference * difference).sum() / n, (lambda g, out: difference * (g * (2 / n)),)


def l1(x: Array, *, target: Array) -> Result:
    """Mean of |x - target| over all elements; 0 where there is none."""
    xp = namespace(x)
    difference = x - _like(x, target)
    n = max(1, x.size)
    return xp.abs(difference).sum() / n, (lambda g, out: xp.sign(difference) * (g / n),)


def _like(x: Array, target: Array) -> Array:
    """Refuse to broadcast a loss: (n, 1) against (n,) would quietly compare all pairs."""
    if not is_array(target):
        raise ValueError(f"expected an array as target, got a {type(target).__name__}")
    if x.shape != target.shape:
        raise ValueError(f"expected a target of shape {x.shape}, got {target.shape}")
    return target.astype(x.dtype, copy=False)


OPS: dict[str, Callable[..., Result]] = {
    "add": add,
    "cross_entropy": cross_entropy,
    "divide": divide,
    "exp": exp,
    "getitem": getitem,
    "l1": l1,
    "linear": linear,
    "log": log,
    "matmul": matmul,
    "mse": mse,
    "multiply": multiply,
    "negative": negative,
    "power": power,
    "relu": relu,
    "reshape": reshape,
    "sigmoid": sigmoid,
    "subtract": subtract,
    "sum": total,
    "tanh": tanh,
    "transpose": transpose,
}
