"""Messages that are sent and received without waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from mpidl.making import made

if TYPE_CHECKING:
    from mpidl.world import World


@final
class Link:
    """Sends and receives without waiting, on a communicator of its own. Made collectively."""

    def __init__(self, world: World) -> None:
        self._MPI = world.MPI
        self.comm = made(world.MPI, world.comm, lambda: world.comm.Clone())
        self._status = world.MPI.Status()
        self._leaving: list[Any] = []  # requests, which hold their messages

    def send(self, message: bytes, rank: int, tag: int) -> None:
        """Send a message, and return at once."""
        request = self.comm.Isend([message, self._MPI.BYTE], rank, tag)
        self._leaving.append((request, message))

    def settle(self) -> bool:
        """Return whether all that was sent has left."""
        if self._leaving:
            self._leaving = [pair for pair in self._leaving if not pair[0].Test()]
        return not self._leaving

    @property
    def settled(self) -> bool:
        """Whether all had left when `settle` last looked; any thread may ask."""
        return not self._leaving

    def receive(self, source: int, tag: int) -> tuple[int, bytearray] | None:
        """Return a message that has come, with its sender, or None. `source` -1: from any rank."""
        MPI, status = self._MPI, self._status
        found = self.comm.Improbe(MPI.ANY_SOURCE if source < 0 else source, tag, status)
        if found is None:
            return None
        message = bytearray(status.Get_count(MPI.BYTE))
        sender = status.Get_source()
        found.Recv([message, MPI.BYTE])
        return sender, message

    def free(self) -> None:
        """Give the communicator back. Collective."""
        self.comm.Free()
