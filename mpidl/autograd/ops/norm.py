"""Normalisation over features, and over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.array import CACHE_BLOCK_BYTES, is_device, namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array
    from mpidl.autograd.ops.shared import Result


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float) -> Result:
    """(x - mean) / sqrt(var + eps) weight + bias over the last axis (Ba et al. 2016).

    Sums over rows are products with a vector of ones: BLAS runs them at memory speed.
    """
    xp, shape = namespace(x), x.shape
    width = weight.shape[0]
    if x.ndim == 0 or shape[-1] != width or bias.shape != (width,):
        raise ValueError(f"expected x (..., {width}) and a bias ({width},)")
    mean_of = xp.full(width, 1 / width, x.dtype)
    rows = x.reshape(-1, width)
    normal = rows - (rows @ mean_of)[:, None]
    inverse = 1 / xp.sqrt((normal * normal) @ mean_of + eps)
    normal *= inverse[:, None]
    y = normal * weight
    y += bias

    def centre(v: Array) -> Array:
        """Remove from rows `v` what a shift or a scaling of x would not change in y."""
        back = normal * (-((v * normal) @ mean_of))[:, None]
        back += v
        back -= (v @ mean_of)[:, None]
        back *= inverse[:, None]
        return back

    adjoints = (
        lambda g, out: centre(g.reshape(-1, width) * weight).reshape(shape),
        lambda g, out: (g.reshape(-1, width) * normal).sum(axis=0),
        lambda g, out: xp.sum(g.reshape(-1, width), axis=0, out=out),
    )

    def push(vx: Any, vw: Any, vb: Any) -> Array:
        return (centre(vx.reshape(-1, width)) * weight + normal * vw + vb).reshape(shape)

    return y.reshape(shape), adjoints, push


def batch_norm(
    x: Array,
    weight: Array,
    bias: Array,
    *,
    mean: Array,
    var: Array,
    eps: float,
    count: float | None = None,
    total: Callable[[Array], Array] | None = None,
) -> Result:
    """(x - mean) / sqrt(var + eps) weight + bias for x (n, channels, ...) (Ioffe, Szegedy 2015).

    With `count` (elements per channel behind `mean` and `var`, which are x's own) the derivative
    knows that both depend on x. With `total` they are those of all ranks: it sums an array (k,)
    over ranks, in the adjoint too, which then is collective. The loss of each rank is taken to be
    a mean over its own samples, weighted by their number when gradients are averaged.
    """
    if x.ndim < 2 or any(a.shape != (x.shape[1],) for a in (weight, bias, mean, var)):
        raise ValueError(f"expected x (n, channels, ...), the rest {weight.shape}")
    xp, channels, dtype = namespace(x), x.shape[1], x.dtype
    rows, shape = rows_of(x), (x.shape[0], *x.shape[2:], channels)
    mean = mean.astype(dtype)
    inverse = (1 / xp.sqrt(var + eps)).astype(dtype)
    slope = weight * inverse

    def like_x(v: Array) -> Array:
        return xp.moveaxis(v.reshape(shape), -1, 1)

    def sums(v: Array) -> tuple[Array, Array]:
        """Return the sums over `v` (rows, channels) and over v times the normalised x."""
        plain, other = xp.zeros(channels, dtype), xp.zeros(channels, dtype)
        for part in row_blocks(v):
            ones = xp.ones(len(v[part]), dtype)
            moved = rows[part] - mean
            moved *= v[part]
            plain += ones @ v[part]  # a product with ones runs at memory speed
            other += ones @ moved
        return plain, other * inverse

    def centre(v: Array) -> Array:
        """Return slope (v - mean(v) - normal mean(v normal)), the means over the statistics'."""
        if count is None:
            return v * slope
        both = xp.concatenate(sums(v))
        # with total: the derivative of the loss of all, in units of this rank's weight in it
        both = (
            both / count if total is None else total(both * len(rows)) / (count * max(1, len(rows)))
        )
        first, second = both.astype(dtype, copy=False).reshape(2, channels)
        along = second * inverse * -slope
        back = xp.empty_like(v)
        for part in row_blocks(v):
            xp.subtract(v[part], first, out=back[part])
            back[part] *= slope
            moved = rows[part] - mean
            moved *= along
            back[part] += moved
        return back

    y = xp.empty_like(rows)
    for part in row_blocks(rows):
        xp.subtract(rows[part], mean, out=y[part])
        y[part] *= slope
        y[part] += bias

    adjoints = (
        lambda g, out: like_x(centre(rows_of(g))),
        lambda g, out: sums(rows_of(g))[1],
        lambda g, out: sums(rows_of(g))[0],
    )

    def push(vx: Array, vw: Any, vb: Any) -> Array:
        return like_x(centre(rows_of(vx)) + (rows - mean) * inverse * vw + vb)

    return like_x(y), adjoints, push


def rows_of(x: Array) -> Array:
    """(n, channels, ...) -> (rows, channels), contiguous: a view, where x lies channels last."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.moveaxis(x, 1, -1)).reshape(-1, x.shape[1])


def row_blocks(rows: Array) -> Iterator[slice]:
    """Cut (rows, channels) so that a few blocks stay in cache; a GPU needs no cutting."""
    limit = len(rows) if is_device(rows) else CACHE_BLOCK_BYTES // max(1, rows[:1].nbytes)
    step = max(1, limit)
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
