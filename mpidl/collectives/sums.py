"""Sums, and what else reduces arrays, over the ranks of a process set."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl.collectives.halves import UFUNCS, Halves
from mpidl.collectives.request import HALVES
from mpidl.staging import CHUNK_BYTES
from mpidl.strategies.adasum import Adasum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.array import Array
    from mpidl.collectives.request import Description
    from mpidl.world import World


@final
class Sums:
    """Reduces flat arrays, each as a `Description` says. All its methods are collective.

    MPI reduces what it has numbers for: of bool, sum and max are "or", product and min "and".
    float16 and bfloat16 are reduced in float32: see `Halves`. Whatever the dtype, min and max of
    numbers of which one is NaN are NaN, as in numpy.minimum.
    """

    def __init__(self) -> None:
        self._halves = Halves()

    def allreduce(self, world: World, flat: Array, d: Description) -> None:
        """Reduce `flat` (n,) in place."""
        if d.op == "adasum":
            self._adasum(world, flat, d)
            return
        if d.dtype in HALVES:
            self._halves.allreduce(world, flat, d)
            return
        scale(flat, d.prescale)
        step = CHUNK_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            chunk = flat[start : start + step]
            values = _wide(chunk, d)
            if world.size > 1:
                world.comm.Allreduce(world.MPI.IN_PLACE, values, _op(world, d))
            _finish(values, d, world.size)
            if values is not chunk:
                chunk[:] = values

    def reduce_scatter(
        self, world: World, flat: Array, counts: Sequence[int], d: Description
    ) -> Array:
        """Return this rank's part of the reduced `flat` (n,), of which rank r gets counts[r]."""
        if d.dtype in HALVES:
            return self._halves.reduce_scatter(world, flat, counts, d)
        if d.prescale != 1:
            flat = flat.copy()
            scale(flat, d.prescale)
        values = _wide(flat, d)
        part = np.empty(counts[world.rank], values.dtype)
        world.comm.Reduce_scatter(values, part, list(counts), _op(world, d))
        _finish(part, d, world.size)
        return part.astype(flat.dtype, copy=False)

    def _adasum(self, world: World, flat: Array, d: Description) -> None:
        wide = self._halves.decode(flat, d.dtype) if d.dtype in HALVES else flat
        scale(wide, d.prescale)
        strategy = Adasum(world)
        _, grad = strategy.allocate(wide.size, wide.dtype, np)
        grad[:] = wide
        for part, piece in strategy.reduce(grad, 1.0):
            wide[part] = piece
        strategy.close()
        scale(wide, d.postscale)
        if wide is not flat:
            self._halves.encode(wide, flat, d.dtype)


def _op(world: World, d: Description) -> Any:
    MPI, logical = world.MPI, d.dtype == "bool"
    if d.op in ("min", "max") and d.dtype in ("float32", "float64"):
        return _extreme(MPI, d.op)
    return {
        "sum": MPI.LOR if logical else MPI.SUM,
        "average": MPI.SUM,
        "max": MPI.LOR if logical else MPI.MAX,
        "min": MPI.LAND if logical else MPI.MIN,
        "product": MPI.LAND if logical else MPI.PROD,
    }[d.op]


@cache  # MPI libraries have room for few of them
def _extreme(MPI: Any, op: str) -> Any:
    """Return an operation like MPI_MIN or MPI_MAX of floating-point numbers, which keeps NaN.

    MPI's own compare, so that with NaN the result hangs on the order. As fast, as measured.
    """

    def reduce(given: Any, kept: Any, datatype: Any) -> None:
        dtype = np.float32 if datatype.Get_size() == 4 else np.float64
        values = np.frombuffer(kept, dtype)
        UFUNCS[op](np.frombuffer(given, dtype), values, out=values)

    return MPI.Op.Create(reduce, commute=True)


def _wide(values: Array, d: Description) -> Array:
    """Return `values` (n,) as they are summed: for an average, one or two bytes as four.

    Else the sum would wrap around, where the average does not. Sums in these dtypes do wrap.
    """
    small = values.dtype.kind in "iu" and values.dtype.itemsize < 4
    return values.astype(np.int32) if small and d.op == "average" else values


def _finish(values: Array, d: Description, ranks: int) -> None:
    """Divide a sum `values` (n,) for an average, and multiply it by the factor that was asked for.

    Averages of integers are truncated toward zero.
    """
    if d.op != "average":
        scale(values, d.postscale)
    elif d.postscale != 1:
        scale(values, d.postscale / ranks)
    elif values.dtype.kind in "fc":
        values /= ranks
    elif ranks > 1:
        below = (values < 0) & (values % ranks != 0)
        values //= ranks
        values += below


def scale(values: Array, factor: float) -> None:
    """Multiply `values` (n,) in place; integers in float64, truncated toward zero."""
    if factor == 1:
        return
    if values.dtype.kind in "fc":
        values *= factor
        return
    values[:] = (values * np.float64(factor)).astype(values.dtype)
