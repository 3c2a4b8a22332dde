"""Sums of float16 and bfloat16, which MPI has no numbers for."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from mpidl.array import blocks
from mpidl.codecs.half import Bf16, Fp16
from mpidl.codecs.scratch import Scratch
from mpidl.staging import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.array import Array
    from mpidl.codecs.base import Codec
    from mpidl.collectives.request import Description
    from mpidl.world import World

UFUNCS = {
    "sum": np.add,
    "average": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "product": np.multiply,
}
BEYOND_HALF = 65520.0  # from here on, float16's nearest number is infinity (IEEE 754, 4.3.1)
BLOCK = 1 << 14  # numbers: what codecs and sums work on stays in a core's cache
INFINITY, SIGN = np.uint16(0x7C00), np.uint16(0x8000)


@final
class Halves:
    """Reduces arrays of two bytes a number: in float32, in the ranks' order, rounded once.

    Each rank gets its part of all others' arrays, reduces it, and hands it to all: 4 (P-1)/P bytes
    a number travel. Same bits in every run and on all ranks. A sum beyond float16's range becomes
    infinite, which loss scaling looks for. All methods are collective but `decode` and `encode`.
    """

    def __init__(self) -> None:
        self._codecs: dict[str, Codec] = {"float16": Fp16(), "bfloat16": Bf16()}
        self._scratch = Scratch()

    def allreduce(self, world: World, flat: Array, d: Description) -> None:
        """Reduce `flat` (n,), of two bytes a number, in place."""
        bits = flat.view(np.uint16)
        for start in range(0, bits.size, CHUNK_BYTES // 2):
            chunk = bits[start : start + CHUNK_BYTES // 2]
            counts = shares(chunk.size, world.size)
            (mine,) = self._scratch.take(counts[world.rank], mine=np.uint16)
            self._reduce(world, chunk, counts, d, mine)
            world.comm.Allgatherv(mine, [chunk, counts])

    def reduce_scatter(
        self, world: World, flat: Array, counts: Sequence[int], d: Description
    ) -> Array:
        """Return this rank's part of the reduced `flat` (n,), of which rank r gets counts[r]."""
        part = np.empty(counts[world.rank], flat.dtype)
        self._reduce(world, flat.view(np.uint16), counts, d, part)
        return part

    def _reduce(
        self, world: World, bits: Array, counts: Sequence[int], d: Description, part: Array
    ) -> None:
        """Fill in `part`, this rank's of the reduced `bits` (n,) uint16, block by block."""
        size, ranks = part.size, world.size
        (arrived,) = self._scratch.take(size * ranks, arrived=np.uint16)
        world.comm.Alltoallv([bits, counts], [arrived, [size] * ranks])
        factor = d.postscale / ranks if d.op == "average" else d.postscale
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            total, addend = self._scratch.take(stop - start, total=np.float32, addend=np.float32)
            for rank in range(ranks):
                values = addend if rank else total
                self._decode(arrived[rank * size + start : rank * size + stop], values, d.dtype)
                if d.prescale != 1:
                    values *= d.prescale
                if rank:
                    UFUNCS[d.op](total, values, out=total)
            if d.op == "average" and d.postscale == 1:
                total /= ranks
            elif factor != 1:
                total *= factor
            self._encode(total, part[start:stop], d.dtype)

    def decode(self, flat: Array, dtype: str) -> Array:
        """Return `flat` (n,), of two bytes a number, as float32 (n,)."""
        values = np.empty(flat.size, np.float32)
        for block in blocks(values, 4 * BLOCK):
            self._decode(flat[block], values[block], dtype)
        return values

    def encode(self, values: Array, flat: Array, dtype: str) -> None:
        """Round `values` (n,) float32 to `flat` (n,), of two bytes a number: to nearest even."""
        for block in blocks(values, 4 * BLOCK):
            self._encode(values[block], flat[block], dtype)

    def _decode(self, bits: Array, values: Array, dtype: str) -> None:
        self._codecs[dtype].decode(bits.view(np.uint8), values)

    def _encode(self, values: Array, flat: Array, dtype: str) -> None:
        self._codecs[dtype].encode(values, flat.view(np.uint8))
        if dtype == "float16":
            beyond = np.abs(values) >= BEYOND_HALF  # the codec bounds finite ones
            if beyond.any():
                bits = flat.view(np.uint16)
                bits[beyond] = INFINITY | (bits[beyond] & SIGN)


def shares(size: int, ranks: int) -> list[int]:
    """Return how many of `size` things each rank gets: the first ones one more."""
    each, more = divmod(size, ranks)
    return [each + (rank < more) for rank in range(ranks)]
