"""Shared memory for one batch at a time, between a rank and one of its workers."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mpidl.array import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.array import Array

#: Where an array lies in a slot: dtype, shape, first byte.
Place: TypeAlias = "tuple[np.dtype, tuple[int, ...], int]"


def aligned(size: int) -> int:
    """Return `size` bytes rounded up to whole cache lines."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def memory_file(name: str) -> int:
    """Return the descriptor of an empty file in memory (memfd_create(2)).

    It has no place in the file system: it is gone once nobody has it open, however they ended.
    """
    return os.memfd_create(name)


class Slot:
    """One end of the memory file `file`, which grows to the largest batch that it has held."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._memory: mmap.mmap | None = None

    def write(self, arrays: Sequence[Array]) -> list[Place]:
        """Store `arrays`, and return what `read` needs at the other end."""
        places: list[Place] = []
        end = 0
        for array in arrays:
            places.append((array.dtype, array.shape, end))
            end += aligned(array.nbytes)
        if self._memory is None or len(self._memory) < end:
            os.ftruncate(self.file, max(end, mmap.PAGESIZE))  # no mapping may be empty
        for array, target in zip(arrays, self.read(places), strict=True):
            target[...] = array
        return places

    def read(self, places: Sequence[Place]) -> list[Array]:
        """Return views of the arrays at `places`: valid until the next `write`, at either end."""
        end = max(start + np.dtype(dtype).itemsize * _size(shape) for dtype, shape, start in places)
        if self._memory is None or len(self._memory) < end:
            self._memory = mmap.mmap(self.file, os.fstat(self.file).st_size)
        return [np.ndarray(shape, dtype, self._memory, start) for dtype, shape, start in places]

    def close(self) -> None:
        """Give the memory back, here: it is freed when the other end is closed, too."""
        self._memory = None
        os.close(self.file)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
