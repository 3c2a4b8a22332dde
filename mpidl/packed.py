"""Means of arrays that cannot be changed in place: packed by dtype, few MPI calls for many arrays.

What `mpidl.jax`, `mpidl.keras` and `mpidl.tensorflow` stand on. It sees NumPy arrays only.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.array import ALIGNMENT_BYTES, aligned_zeros
from mpidl.errors import InvalidArgument, MpidlError, UnsupportedDtype
from mpidl.staging import CHUNK_BYTES
from mpidl.strategies import AllReduce
from mpidl.world import World, current

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpidl.array import Array

#: In which dtype the numbers of another are added up, and travel.
WIRE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}

_callback_world: World | None = None


@dataclass(frozen=True)
class Packing:
    """Where each array lies in one flat array for each dtype on the wire."""

    places: tuple[tuple[str, int, tuple[int, ...]], ...]  #: (dtype on the wire, start, shape)
    sizes: dict[str, int]  #: of the flat arrays
    layout: str  #: names, shapes and dtypes: the same on every rank

    @classmethod
    def of(cls, arrays: Mapping[str, Any], line: int = ALIGNMENT_BYTES) -> Packing:
        """Lay out arrays, of which only `shape` and `dtype` are read. Not collective.

        Each starts on a multiple of `line` bytes. Raises UnsupportedDtype.
        """
        places, sizes, told = [], dict[str, int](), []
        for name, array in arrays.items():
            dtype = str(array.dtype)
            if dtype not in WIRE:
                raise UnsupportedDtype(f"{name} has dtype {dtype}; supported are {', '.join(WIRE)}")
            wire = WIRE[dtype]
            step = max(1, line // np.dtype(wire).itemsize)
            start = -(-sizes.get(wire, 0) // step) * step
            places.append((wire, start, tuple(array.shape)))
            sizes[wire] = start + math.prod(array.shape)
            told.append(f"{name} {tuple(array.shape)} {dtype}")
        return cls(tuple(places), sizes, "\n".join(told))

    def views(self, flats: Mapping[str, Array]) -> list[Array]:
        """Return each array as a view of the flat one that it lies in."""
        return [
            flats[wire][start : start + math.prod(shape)].reshape(shape)
            for wire, start, shape in self.places
        ]


def average(
    arrays: Mapping[str, Array], weight: Any, world: World, problem: MpidlError | None = None
) -> list[Array]:
    """Return the weighted mean over ranks of each array, in new memory. Collective.

    `arrays` are named, of float32, float64, float16 or bfloat16, the latter two added up in
    float32 and rounded once. Each mean starts on a cache line. `problem` is one that this rank
    has met on the way here.

    Raises on every rank UnsupportedDtype, InvalidArgument for a weight below 0 or not finite, or
    all of 0, RankMismatch where names, shapes or dtypes differ, and any rank's `problem`.
    """
    packing = Packing((), {}, "")
    if problem is None:
        try:
            packing = Packing.of(arrays)
        except MpidlError as error:
            problem = error
    flats = {wire: aligned_zeros(size, wire) for wire, size in packing.sizes.items()}
    means = packing.views(flats)
    try:
        weight = float(weight)
    except (TypeError, ValueError):
        problem, weight = problem or InvalidArgument(f"{weight=}: expected a number"), 0.0
    for mean, array in zip(means, arrays.values(), strict=False):  # none, with a problem
        np.copyto(mean, array, casting="same_kind")
    reduce(flats, packing.layout, weight, world, problem)
    return [
        mean.astype(array.dtype, copy=False)
        for mean, array in zip(means, arrays.values(), strict=True)
    ]


def reduce(
    flats: Mapping[str, Array],
    layout: str,
    weight: float,
    world: World,
    problem: MpidlError | None = None,
) -> None:
    """Replace each flat array (n,) by its weighted mean over ranks. Collective.

    One short message settles the sum of the weights, and whether all have the same `layout`.
    Raises on every rank what `average` raises.
    """
    if problem is None and not 0 <= weight < math.inf:
        problem = InvalidArgument(f"weight={weight}: expected a finite number, 0 or more")
    # Of P numbers with the sum s and the sum of squares q, s^2 = P q only if they are all equal
    # (Cauchy and Schwarz). Of 20 bits each, both sums are exact in float64.
    code = zlib.crc32(layout.encode()) >> 12
    mine = 0.0 if problem is not None else weight
    sums = world.sum([mine, problem is not None, code, code * code])
    total, problems = map(float, sums[:2])
    s, q = map(int, sums[2:])
    if problems:
        world.agree(problem)
    if s * s != world.size * q:
        compare(layout, world)
    if total == 0:
        world.agree(InvalidArgument("the weights of all ranks are 0: there is no mean"))
    strategy = AllReduce(world)
    for flat in flats.values():
        if weight == 0:
            flat.fill(0)  # whatever it holds, 0 x NaN is not 0
        for _ in strategy.reduce(flat, weight / total):
            pass  # it works in place
    strategy.close()


def compare(layout: str, world: World) -> None:
    """Raise RankMismatch on every rank, with the first line that is not rank 0's. Collective."""
    mine, first = layout.split("\n"), world.broadcast(layout).split("\n")
    length = max(len(mine), len(first))
    mine, first = (lines + ["no more"] * (length - len(lines)) for lines in (mine, first))
    world.agree(
        next(
            (f"{a}, where rank 0 has {b}" for a, b in zip(mine, first, strict=True) if a != b), None
        )
    )


def broadcast(
    arrays: Mapping[str, Array], root: int, world: World, problem: MpidlError | None = None
) -> list[Array]:
    """Return rank `root`'s values of each array, in new memory. Collective. Any dtype.

    Raises on every rank InvalidArgument for a root that is no rank, RankMismatch where roots,
    names, shapes or dtypes differ, and any rank's `problem`.
    """
    if problem is None and not 0 <= root < world.size:
        problem = InvalidArgument(f"root {root}: expected a rank from 0 to {world.size - 1}")
    world.agree(problem)
    told = [f"{name} {array.shape} {array.dtype}" for name, array in arrays.items()]
    compare("\n".join([f"root {root}", *told]), world)
    starts, end = [], 0
    for array in arrays.values():
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    packed = aligned_zeros(end, np.uint8)
    copies = [
        packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        for start, array in zip(starts, arrays.values(), strict=True)
    ]
    if world.rank == root:
        for copy, array in zip(copies, arrays.values(), strict=True):
            copy[...] = array
    for start in range(0, end, CHUNK_BYTES):
        world.comm.Bcast(packed[start : start + CHUNK_BYTES], root)
    return copies


def callback_world() -> World:
    """Return all ranks, for what frameworks call from threads of their own.

    Collective at its first call: it has communicators of its own, since the main thread may go on,
    and average other things meanwhile. Raises InvalidArgument where MPI does not know threads.
    """
    global _callback_world
    if _callback_world is None:
        world = current()
        if not world.threads:
            raise InvalidArgument(
                "averages inside compiled functions need MPI_THREAD_MULTIPLE, which this MPI was "
                "not started with: average outside of them"
            )
        _callback_world = world.for_thread()
    return _callback_world
