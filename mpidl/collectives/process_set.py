"""Some of the ranks, with a communicator of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from mpidl.making import made, noted

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.world import World

MEETING = 1  # a tag; Adasum has 0


@final
@dataclass(frozen=True)
class ProcessSet:
    """Some ranks of the world, in its order."""

    id: int
    ranks: tuple[int, ...]
    world: World | None  #: of these ranks alone; None where this rank is none of them

    @classmethod
    def of(cls, world: World, number: int, ranks: tuple[int, ...]) -> ProcessSet:
        """Make one of `ranks` of `world`. Collective over `world`."""
        MPI = world.MPI
        color = 0 if world.rank in ranks else MPI.UNDEFINED
        comm = made(MPI, world.comm, lambda: world.comm.Split(color, world.rank))
        if comm == MPI.COMM_NULL:
            return cls(number, ranks, None)
        comm = noted(comm)
        return cls(number, ranks, replace(world, comm=comm, rank=comm.rank, size=comm.size))

    def free(self) -> None:
        """Give the communicator back. Collective over these ranks."""
        if self.world is not None:
            self.world.comm.Free()


def meet(world: World, wait: Callable[[list[Any]], None]) -> None:
    """Wait until all ranks are here, in ceil(log2 P) rounds of messages. Collective.

    The dissemination barrier (Hensgen, Finkel and Manber 1988). All waiting for ranks that are
    late is done here, by `wait`, which leaves the core to others; the blocking calls that follow
    are among ranks that are all in them. MPI's own non-blocking barrier takes ten times as long.
    """
    distance, nothing = 1, bytearray(0)
    while distance < world.size:
        wait([
            world.comm.Irecv(nothing, (world.rank - distance) % world.size, MEETING),
            world.comm.Isend(nothing, (world.rank + distance) % world.size, MEETING),
        ])  # fmt: skip
        distance *= 2
