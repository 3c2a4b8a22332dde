"""The ring allreduce, over point-to-point messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpidl.array import namespace, synchronize
from mpidl.errors import InvalidArgument
from mpidl.staging import Staging
from mpidl.strategies.base import in_turn, private

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.world import World

RECEIVES = 2  # posted ahead: one fills while the other is added


@final
class Ring:
    """Every rank owns everything; a reduce-scatter and an allgather go round a ring.

    Each rank sends 2 (P-1)/P of the array, the least possible (Patarasuk and Yuan 2009,
    section 3). Rank r starts with segment r. It adds each segment that arrives to its own and
    passes it on; after P-1 hops a segment is complete, and goes round once more to be copied.
    Segments travel as chunks of `chunk_bytes`, and a chunk is passed on as soon as it is added,
    so all links are busy all the time. The order of each sum is fixed: same bits in every run.
    """

    shared: ClassVar[bool] = False

    def __init__(self, world: World, chunk_bytes: int = 1 << 20) -> None:
        if chunk_bytes < 64:
            raise InvalidArgument(f"chunk_bytes={chunk_bytes}: expected 64 or more")
        self.world, self.chunk_bytes, self.staging = world, chunk_bytes, Staging()

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,)."""
        return private(size, dtype, xp)

    def owned(self, size: int) -> slice:
        """Return all of it."""
        return slice(0, size)

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Sum the weighted `grad` (n,) in place. Collective."""
        if self.world.size > 1:
            with self.staging.host(grad) as buffer:
                self._round(buffer, weight)
        yield slice(0, grad.size), grad

    def stream(self, grads: Sequence[Array], weight: float) -> Stream:
        """Reduce one array after the other. Collective."""
        return in_turn(self, grads, weight)

    def share(self, param: Array) -> None:
        """Nothing to send: every rank made the same update."""

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Nothing to add: every rank owns everything."""
        return np.array(values, np.float64)

    def close(self) -> None:
        """Give the pinned memory back."""
        self.staging.close()

    def _round(self, buffer: Array, weight: float) -> None:
        rank, size, comm = self.world.rank, self.world.size, self.world.comm
        left, right = (rank - 1) % size, (rank + 1) % size
        sums = [c for hop in range(1, size) for c in self._chunks(buffer, rank - hop)]
        copies = [c for hop in range(size - 1) for c in self._chunks(buffer, rank - hop)]
        arriving = sums + copies
        passed_on = len(arriving) - sum(1 for _ in self._chunks(buffer, rank - size + 2))
        length = min(buffer.size, self.chunk_bytes // buffer.itemsize)
        scratch = [namespace(buffer).empty(length, buffer.dtype) for _ in range(RECEIVES)]
        sends: dict[int, Any] = {}  # by the first element of the chunk
        receives: list[Any] = []

        def send(chunk: slice) -> None:
            synchronize(buffer)
            sends[chunk.start] = comm.Isend(buffer[chunk], right)

        def receive(stop: int) -> None:
            for i in range(len(receives), min(stop, len(arriving))):
                chunk = arriving[i]
                if i < len(sums):
                    place = scratch[i % RECEIVES][: chunk.stop - chunk.start]
                elif chunk.start in sends:
                    sends.pop(chunk.start).Wait()  # its sum left from here, and must be gone
                    place = buffer[chunk]
                else:  # short arrays: its sum is still to come
                    break
                receives.append(comm.Irecv(place, left))

        receive(min(RECEIVES, len(sums)))
        for chunk in self._chunks(buffer, rank):
            buffer[chunk] *= weight
            send(chunk)
        for i, chunk in enumerate(arriving):
            receive(i + RECEIVES)
            receives[i].Wait()
            if i < len(sums):
                own = buffer[chunk]
                own *= weight
                own += scratch[i % RECEIVES][: own.size]
            if i < passed_on:
                send(chunk)
        self.world.MPI.Request.Waitall(list(sends.values()))

    def _chunks(self, buffer: Array, segment: int) -> Iterator[slice]:
        """Yield the chunks of segment `segment` mod P of the buffer (n,)."""
        segment %= self.world.size
        stop = buffer.size * (segment + 1) // self.world.size
        step = self.chunk_bytes // buffer.itemsize
        for start in range(buffer.size * segment // self.world.size, stop, step):
            yield slice(start, min(start + step, stop))
