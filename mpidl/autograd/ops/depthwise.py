"""Convolution where each channel has a kernel of its own: a sum of shifted products.

As matrix products (see conv.py) these would be one tiny product for each channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.array import is_device, namespace
from mpidl.autograd.ops.shared import sum_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.autograd.ops.windows import Windows


def correlate(x: Array, weight: Array, bias: Array | None, windows: Windows) -> Array:
    """Correlate x (n, c, h, w) with weight (c, 1, kh, kw), plus bias (c,)."""
    xp, c = namespace(x), x.shape[1]
    y = xp.empty((len(x), *windows.output(x.shape[2:]), c), x.dtype)
    for samples, taps in _shifts(x, windows):
        sums, product = y[samples], xp.empty_like(y[samples])
        sums[...] = 0 if bias is None else bias
        for (i, j), part in taps:
            sums += xp.multiply(part, weight[:, 0, i, j], out=product)
    return y.transpose(0, 3, 1, 2)


def to_weight(g: Array, x: Array, windows: Windows) -> Array:
    """Return the gradient (c, 1, kh, kw) of the weight, given g (n, oh, ow, c), channels last."""
    xp, c = namespace(x), x.shape[1]
    back = xp.zeros((*windows.kernel, c), x.dtype)
    for samples, taps in _shifts(x, windows):
        product = xp.empty_like(g[samples])
        for (i, j), part in taps:
            xp.multiply(part, g[samples], out=product)
            back[i, j] += sum_rows(product.reshape(-1, c))
    return back.transpose(2, 0, 1)[:, None]


def _shifts(x: Array, windows: Windows) -> Iterator[tuple[slice, list[tuple[Any, Array]]]]:
    """Yield one sample at a time, and for each place (i, j) of the kernel what lies under it.

    One sample, so that all stays in cache; a GPU takes them all at once. (n, oh, ow, c) each.
    """
    xp, (n, c, h, w) = namespace(x), x.shape
    (kh, kw), (sh, sw), (dh, dw) = windows.kernel, windows.stride, windows.dilation
    (top, left), (oh, ow) = windows.padding, windows.output((h, w))
    step = max(1, n if is_device(x) else 1)
    padded = xp.zeros((step, h + 2 * top, w + 2 * left, c), x.dtype)
    taps = [
        (
            (i, j),
            padded[
                :,
                i * dh : i * dh + sh * (oh - 1) + 1 : sh,
                j * dw : j * dw + sw * (ow - 1) + 1 : sw,
            ],
        )
        for i in range(kh)
        for j in range(kw)
    ]
    for start in range(0, n, step):
        samples = slice(start, start + step)
        padded[:, top : top + h, left : left + w] = x[samples].transpose(0, 2, 3, 1)
        yield samples, taps
