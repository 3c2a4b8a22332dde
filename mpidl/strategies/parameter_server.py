"""A parameter server, whose servers are ranks that train too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from mpidl import clock
from mpidl.errors import InvalidArgument
from mpidl.refuse import refuses
from mpidl.refuse import whole as check_whole
from mpidl.staging import Staging
from mpidl.strategies.base import in_turn, private, publish_in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.world import World


@final
class ParameterServer:
    """S ranks, spread evenly, own 1/S of each array: they reduce, update and broadcast it.

    After Li et al. 2014 (OSDI), section 3, without its delays: every rank waits for the new
    parameters. The optimizer's state exists once, on the servers.

    With `asynchronous` nobody waits, and `DataParallel` calls none of the collectives below in its
    steps: see `AsynchronousUpdate`. A gradient is then dropped if it was computed from parameters
    that are more than `staleness` steps old; P updates, one for each rank, count as one step.

    Raises InvalidArgument unless 1 <= servers <= ranks and staleness >= 0, a whole number, and for
    `asynchronous` where MPI's threads are limited (MPI_THREAD_MULTIPLE): servers need one.
    """

    shared: ClassVar[bool] = False

    @refuses
    def __init__(
        self, world: World, servers: int = 1, asynchronous: bool = False, staleness: int = 4
    ) -> None:
        if check_whole("servers", servers, 1) > world.size:
            raise InvalidArgument(
                f"servers={servers}: expected 1 to {world.size}, the number of ranks"
            )
        check_whole("staleness", staleness)
        if asynchronous not in (True, False):
            raise InvalidArgument(f"{asynchronous=}: expected True or False")
        if asynchronous and not world.threads:
            raise InvalidArgument(
                "asynchronous=True needs MPI_THREAD_MULTIPLE, and MPI was started without it: let "
                "mpidl.init() start MPI, or use a library that has it"
            )
        self.world, self.servers, self.staging = world, servers, Staging(world)
        self.asynchronous, self.staleness = asynchronous, staleness

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,)."""
        return private(size, dtype, xp, self.world)

    def owned(self, size: int) -> slice:
        """Return the part of a server, and nothing for the others."""
        parts = self.parts(size)
        return next((part for root, part in parts if root == self.world.rank), slice(0, 0))

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Sum the weighted `grad` (n,) at the servers, in place, chunk by chunk. Collective."""
        for root, whole in self.parts(grad.size):
            mine = root == self.world.rank
            for part in self._chunks(grad, whole):
                chunk = grad[part]
                chunk *= weight
                with self.staging.host(chunk, write=mine) as buffer:
                    send, receive = (self.world.MPI.IN_PLACE, buffer) if mine else (buffer, None)
                    self.world.comm.Reduce(send, receive, root=root)
                if mine:
                    clock.moved_bytes += chunk.nbytes * (self.world.size - 1)
                    yield part, chunk

    def stream(self, grads: Sequence[Array], weight: float) -> Stream:
        """Reduce one array after the other. Collective."""
        return in_turn(self, grads, weight)

    def keep(self, grad: Array, part: slice, mean: Array) -> None:
        """Nothing to write: the means are in place."""

    def complete(self, grad: Array) -> None:
        """Broadcast every server's part of `grad` (n,). Collective."""
        self.share(grad)

    def share(self, param: Array) -> None:
        """Broadcast every server's part of `param` (n,). Collective."""
        for root, whole in self.parts(param.size):
            mine = root == self.world.rank
            for part in self._chunks(param, whole):
                with self.staging.host(param[part], read=mine, write=not mine) as buffer:
                    self.world.comm.Bcast(buffer, root=root)
                    clock.moved_bytes += 0 if mine else buffer.nbytes

    def publish(self, params: Sequence[Array]) -> Iterator[int]:
        """Share one array after the other. Collective."""
        return publish_in_turn(self, params)

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Add up what the servers hold; the others own no part and count as nothing. Collective."""
        return self.world.sum(values)

    def close(self) -> None:
        """Give the pinned memory back."""
        self.staging.close()

    def _chunks(self, array: Array, whole: slice) -> Iterator[slice]:
        """Cut the part `whole` of an array (n,) into slices for one MPI call each."""
        for part in self.staging.chunks(array[whole]):
            yield slice(whole.start + part.start, whole.start + part.stop)

    def parts(self, size: int) -> Iterator[tuple[int, slice]]:
        """Yield each server's rank and its part of an array (size,). Not collective."""
        for s in range(self.servers):
            part = slice(size * s // self.servers, size * (s + 1) // self.servers)
            yield s * self.world.size // self.servers, part
