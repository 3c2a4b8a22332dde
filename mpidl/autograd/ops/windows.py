"""The windows of a convolution, as the columns of matrices (im2col: Chellapilla et al. 2006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.array import is_device, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array

    Pair = tuple[int, int]

BLOCK_BYTES = 1 << 18  # of columns: half of a core's L2 cache
DEVICE_BLOCK_BYTES = 1 << 28


def pair(value: int | Pair, name: str, least: int) -> Pair:
    """Return two whole numbers, given one or two; raises ValueError below `least`."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(n, int) or n < least for n in both):
        raise ValueError(f"{name}={value}: expected one or two whole numbers, {least} or more")
    return both[0], both[1]


@dataclass(frozen=True)
class Windows:
    """Where the windows lie in x (n, c, h, w), c in groups."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def output(self, size: Pair) -> Pair:
        """Return how many windows there are along (h, w); raises ValueError if there are none."""
        each = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        high, wide = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
        if min(high, wide) < 1:
            raise ValueError(f"a window of {self.kernel} does not fit into {size}")
        return high, wide

    def columns(self, x: Array) -> Iterator[tuple[tuple[slice, slice], Array]]:
        """Yield a block of windows at a time: which samples and rows, and (groups, m, k).

        Several samples, or a few rows of one. m counts the windows, row by row; k = kh kw
        c/groups, in this order. The memory is used again for the next block, so that it stays in
        cache. It is laid out for long contiguous runs: along a row of the picture, or over the
        channels.
        """
        xp, (n, c, h, w) = namespace(x), x.shape
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        (top, left), (oh, ow), g = self.padding, self.output((h, w)), self.groups
        limit = DEVICE_BLOCK_BYTES if is_device(x) else BLOCK_BYTES
        row = ow * kh * kw * c * x.itemsize
        step, rows = max(1, limit // max(1, oh * row)), min(oh, max(1, limit // max(1, row)))
        planes = kw * c < ow
        for start in range(0, n, step):
            samples = slice(start, min(n, start + step))
            m = samples.stop - start
            if start == 0 or m != step:
                padded = self._padded(x, m, planes)
                inside = padded[:, :, top : top + h, left : left + w]
                a, b, d, e = padded.strides
                windows = xp.lib.stride_tricks.as_strided(
                    padded,
                    (m, oh, ow, g, kh, kw, c // g),
                    (a, sh * d, sw * e, c // g * b, dh * d, dw * e, b),
                )
                copy = None
            inside[...] = x[samples]
            for first in range(0, oh, rows):
                down = slice(first, min(oh, first + rows))
                part = windows[:, down]
                if planes:
                    part = part.transpose(3, 4, 5, 6, 0, 1, 2)
                if copy is None or copy.shape != part.shape:
                    copy = xp.empty(part.shape, x.dtype)
                copy[...] = part
                k = kh * kw * c // g
                if planes:
                    yield (samples, down), copy.reshape(g, k, -1).swapaxes(1, 2)
                else:
                    yield (samples, down), copy.reshape(-1, g, k).swapaxes(0, 1)

    def _padded(self, x: Array, m: int, planes: bool) -> Array:
        """Return zeros (m, c, h, w) with room for the border, in memory planes or channels last."""
        xp, (_, c, h, w) = namespace(x), x.shape
        h, w = h + 2 * self.padding[0], w + 2 * self.padding[1]
        if planes:
            return xp.zeros((m, c, h, w), x.dtype)
        return xp.zeros((m, h, w, c), x.dtype).transpose(0, 3, 1, 2)
