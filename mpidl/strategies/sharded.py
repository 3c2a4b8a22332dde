"""Reduce-scatter, update, allgather: ZeRO's first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from mpidl import clock
from mpidl.array import namespace, real_of
from mpidl.staging import Staging, wire
from mpidl.strategies.base import in_turn, private, publish_in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.world import World

PIECE_BYTES = 1 << 18  # of each part, in one MPI call; measured: twice as fast as 2 MiB


@final
class Sharded:
    """Each rank owns one of P equal parts, and the optimizer's state of it.

    ZeRO stage 1 (Rajbhandari et al. 2020, section 5.1): MPI_Reduce_scatter brings each part's sum
    to its owner, and MPI_Allgatherv the updated parts to all (MPI-4.1, sections 6.10 and 6.7). As
    many bytes move as in an allreduce, but each rank updates 1/P, and keeps 1/P of the state.
    """

    shared: ClassVar[bool] = False

    def __init__(self, world: World) -> None:
        self.world, self.staging = world, Staging(world)

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,)."""
        return private(size, dtype, xp, self.world)

    def owned(self, size: int) -> slice:
        """Return this rank's part."""
        return self._parts(size)[self.world.rank]

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Sum the weighted `grad` (n,) at the owners, a piece of each part at a time. Collective.

        Weighting puts the pieces side by side, as MPI wants them.
        """
        for pieces, places in self._chunks(grad):
            real = real_of(grad.dtype)
            packed = namespace(grad).empty(places[-1].stop, real)
            for piece, place in zip(pieces, places, strict=True):
                namespace(grad).multiply(grad[piece], weight, out=packed[place], dtype=real)
            counts = [place.stop - place.start for place in places]
            with self.staging.host(packed) as buffer:  # the sum comes to its beginning
                self.world.comm.Reduce_scatter(self.world.MPI.IN_PLACE, buffer, counts)
            clock.moved_bytes += counts[self.world.rank] * (self.world.size - 1) * grad.itemsize
            yield pieces[self.world.rank], packed[: counts[self.world.rank]]

    def stream(self, grads: Sequence[Array], weight: float) -> Stream:
        """Reduce one array after the other. Collective."""
        return in_turn(self, grads, weight)

    def keep(self, grad: Array, part: slice, mean: Array) -> None:
        """Write it into `grad` (n,)."""
        grad[part] = mean

    def complete(self, grad: Array) -> None:
        """Send every rank's part of `grad` (n,) to all. Collective."""
        self.share(grad)

    def share(self, param: Array) -> None:
        """Send every rank's part of `param` (n,) to all. Collective."""
        mine = self.world.rank
        for pieces, places in self._chunks(param):
            packed = namespace(param).empty(places[-1].stop, param.dtype)
            packed[places[mine]] = param[pieces[mine]]
            counts = [place.stop - place.start for place in places]
            with self.staging.host(packed) as buffer:
                self.world.comm.Allgatherv(self.world.MPI.IN_PLACE, [wire(buffer), counts])
            clock.moved_bytes += packed.nbytes - counts[mine] * param.itemsize
            for rank, (piece, place) in enumerate(zip(pieces, places, strict=True)):
                if rank != mine:
                    param[piece] = packed[place]

    def publish(self, params: Sequence[Array]) -> Iterator[int]:
        """Share one array after the other. Collective."""
        return publish_in_turn(self, params)

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Add up what the ranks own. Collective."""
        return self.world.sum(values)

    def close(self) -> None:
        """Give the pinned memory back."""
        self.staging.close()

    def _parts(self, size: int) -> list[slice]:
        """Return the part of an array (size,) that each rank owns."""
        ends = [size * r // self.world.size for r in range(self.world.size + 1)]
        return [slice(*ends[r : r + 2]) for r in range(self.world.size)]

    def _chunks(self, array: Array) -> Iterator[tuple[list[slice], list[slice]]]:
        """Yield pieces of `array` (n,), one of every rank's part, and their places side by side."""
        parts = self._parts(array.size)
        step = PIECE_BYTES // array.itemsize
        for done in range(0, -(-array.size // self.world.size), step):
            pieces, places, end = [], [], 0
            for p in parts:
                start, stop = min(p.start + done, p.stop), min(p.start + done + step, p.stop)
                pieces.append(slice(start, stop))
                places.append(slice(end, end + stop - start))
                end += stop - start
            yield pieces, places
