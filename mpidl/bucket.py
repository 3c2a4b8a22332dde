"""Buckets: all parameters and gradients of a model, as views into few flat arrays per dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpidl.array import ALIGNMENT_BYTES, Array, is_device, namespace
from mpidl.errors import UnsupportedDtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mpidl.strategies import Strategy

BUCKET_BYTES = 32 << 20
FINE_BYTES = 1 << 18
SUPPORTED_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))  # in the machine's byte order


@dataclass(frozen=True)
class Bucket:
    """`param` and `grad` (n,) hold the arrays named in `places`, from `start` on, in this order."""

    param: Array
    grad: Array
    places: dict[str, tuple[int, tuple[int, ...]]]  #: name -> (start, shape)
    group: int = 0  #: of all these arrays, as given to `allocate`

    def slices(self) -> dict[str, slice]:
        """Return where each array lies, by name."""
        return {
            name: slice(start, start + math.prod(shape))
            for name, (start, shape) in self.places.items()
        }

    def views(self) -> Iterator[tuple[str, Array, Array]]:
        """Yield name, parameter and gradient, the latter two as views in their own shape."""
        for name, part in self.slices().items():
            shape = self.places[name][1]
            yield name, self.param[part].reshape(shape), self.grad[part].reshape(shape)

    def parts(self, owned: slice) -> list[slice]:
        """Return where each array lies in `param[owned]`; an empty slice where it does not."""
        first, last, _ = owned.indices(self.param.size)
        found = []
        for part in self.slices().values():
            low, high = max(part.start, first), min(part.stop, last)
            found.append(slice(low - first, high - first) if low < high else slice(0, 0))
        return found


def check_dtype(array: Array, name: str) -> None:
    """Raise UnsupportedDtype unless MPI can sum the array and a mean can be held in it."""
    if array.dtype not in SUPPORTED_DTYPES:
        known = ", ".join(map(str, SUPPORTED_DTYPES))
        raise UnsupportedDtype(f"{name} has dtype {array.dtype}; supported are {known}")


def bytes_for(size: int, asked: int | str, *, overlaps: bool) -> int:
    """Return about how large a bucket is to be, of `size` bytes of gradients; or what was `asked`.

    Where averaging overlaps with backward, several are averaged at once.
    """
    if asked != "auto":
        return int(asked)
    return min(max(size // 64, FINE_BYTES), BUCKET_BYTES) if overlaps else BUCKET_BYTES


def allocate(
    arrays: Mapping[str, Array],
    strategy: Strategy,
    bucket_bytes: int,
    group_of: Mapping[str, int] | None = None,
) -> list[Bucket]:
    """Lay out `arrays` in buckets of about `bucket_bytes`, one dtype and group each. Collective.

    `group_of` tells which arrays may share a bucket; by default all. The last array comes first:
    backward makes gradients in that order. Each array starts on a cache line. Nothing is copied
    into the buckets.
    """
    groups: dict[tuple[str, bool, int], list[str]] = {}
    for name in reversed(list(arrays)):
        array = arrays[name]
        group = group_of[name] if group_of else 0
        groups.setdefault((array.dtype.str, is_device(array), group), []).append(name)
    buckets = []
    for (_, _, group), names in groups.items():
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for i, name in enumerate(names):
            array = arrays[name]
            places[name] = (end, array.shape)
            line = ALIGNMENT_BYTES // array.itemsize
            end = -(-(end + array.size) // line) * line
            if end * array.itemsize >= bucket_bytes or i == len(names) - 1:
                layout = tuple(places.values())
                param, grad = strategy.allocate(end, array.dtype, namespace(array), layout)
                buckets.append(Bucket(param, grad, places, group))
                places, end = {}, 0
    return buckets
