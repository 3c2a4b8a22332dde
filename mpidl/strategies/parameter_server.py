"""A synchronous parameter server, whose servers are ranks that train too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from mpidl.errors import InvalidArgument
from mpidl.staging import Staging
from mpidl.strategies.base import private

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from mpidl.array import Array, Averages
    from mpidl.world import World


@final
class ParameterServer:
    """S ranks, spread evenly, own 1/S of each array: they reduce, update and broadcast it.

    After Li et al. 2014 (OSDI), section 3, without its delays: every rank waits for the new
    parameters. The optimizer's state exists once, on the servers.
    Raises InvalidArgument unless 1 <= servers <= ranks.
    """

    shared: ClassVar[bool] = False

    def __init__(self, world: World, servers: int = 1) -> None:
        if not 1 <= servers <= world.size:
            raise InvalidArgument(
                f"servers={servers}: expected 1 to {world.size}, the number of ranks"
            )
        self.world, self.servers, self.staging = world, servers, Staging()

    def allocate(self, size: int, dtype: Any, xp: Any) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,)."""
        return private(size, dtype, xp)

    def owned(self, size: int) -> slice:
        """Return the part of a server, and nothing for the others."""
        parts = self._parts(size)
        return next((part for root, part in parts if root == self.world.rank), slice(0, 0))

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Sum the weighted `grad` (n,) at the servers, in place, chunk by chunk. Collective."""
        for root, whole in self._parts(grad.size):
            mine = root == self.world.rank
            for part in self._chunks(grad, whole):
                chunk = grad[part]
                chunk *= weight
                with self.staging.host(chunk, write=mine) as buffer:
                    send, receive = (self.world.MPI.IN_PLACE, buffer) if mine else (buffer, None)
                    self.world.comm.Reduce(send, receive, root=root)
                if mine:
                    yield part, chunk

    def share(self, param: Array) -> None:
        """Broadcast every server's part of `param` (n,). Collective."""
        for root, whole in self._parts(param.size):
            mine = root == self.world.rank
            for part in self._chunks(param, whole):
                with self.staging.host(param[part], read=mine, write=not mine) as buffer:
                    self.world.comm.Bcast(buffer, root=root)

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

    def _parts(self, size: int) -> Iterator[tuple[int, slice]]:
        """Yield each server's rank and its part of an array (size,)."""
        for s in range(self.servers):
            part = slice(size * s // self.servers, size * (s + 1) // self.servers)
            yield s * self.world.size // self.servers, part
