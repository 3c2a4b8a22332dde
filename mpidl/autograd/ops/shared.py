"""What the operations share: the form of their results, and sums over broadcast axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mpidl.array import is_device, namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

    #: value, adjoints (one for each input), push
    Result: TypeAlias = tuple[Any, tuple[Callable[[Array, Array | None], Array], ...], Any]


_add: Any = np.add


def shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of an array, and () of a number."""
    return getattr(x, "shape", ())


def total(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """Return the sum along `axis`; NumPy's method goes through Python, at three times the cost."""
    if x.__class__ is np.ndarray:
        return _add.reduce(x, axis=axis, keepdims=keepdims)
    return x.sum(axis=axis, keepdims=keepdims)


def scaled_sum(x: Array, scale: float, axis: Any = None, keepdims: bool = False) -> Array:
    """Return the sum along `axis` times `scale`: of float16 in float32, where the sum may pass."""
    if x.dtype.itemsize < 4:
        whole = x.sum(axis=axis, keepdims=keepdims, dtype=np.float32)
        return (whole * scale).astype(x.dtype)
    return total(x, axis, keepdims) * scale


def fit(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum `gradient` over the axes along which an input of this shape was broadcast."""
    if gradient.shape == shape:
        return gradient
    if not shape:
        return total(gradient)
    extra = gradient.ndim - len(shape)
    if extra:
        gradient = total(gradient, tuple(range(extra)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return total(gradient, stretched, keepdims=True) if stretched else gradient


def same(gradient: Array, out: Array | None) -> Array:
    """The adjoint of what changes nothing."""
    return gradient


def summed(value: Array, x: Any) -> Any:
    """Return the adjoint that sums a gradient of `value` over the axes along which x was broadcast.

    The common case costs nothing: x has the value's shape.
    """
    shape = shape_of(x)
    return same if shape == value.shape else lambda g, out: fit(g, shape)


def channels_last(x: Array) -> Array:
    """Return x (n, c, h, w) as a contiguous array (n, h, w, c): itself, where it lies so."""
    return namespace(x).ascontiguousarray(x.transpose(0, 2, 3, 1))


def in_memory_order(*arrays: Array) -> list[Array]:
    """Return all arrays, of one shape, flat, in the order in which the first lies in memory.

    Views, where they lie in the same order without gaps; copies else.
    """
    first = arrays[0]
    axes = sorted(range(first.ndim), key=lambda axis: -first.strides[axis])
    return [a.transpose(axes).reshape(-1) for a in arrays]


def add_rows(into: Array, rows: Array, values: Array) -> None:
    """into[rows] += values for rows (n,) of integers, equal ones added up; values (n, ...).

    NumPy's add.at takes long for rows: on the host they are sorted, and each is summed in one go.
    """
    if is_device(into):
        namespace(into).add.at(into, rows, values)
    elif rows.size:
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        into[ordered[starts]] += np.add.reduceat(values[order], starts, axis=0)
