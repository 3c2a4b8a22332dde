"""Messages between the ranks and the coordinator: ids as an array, all else pickled."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mpidl.world import World

BATCH, ANSWER = 1, 2  # tags
HEAD_BYTES = 4


def pack(ids: npt.NDArray[np.int32], rest: Any) -> bytes:
    """Return a message of `ids` (n,) and of any other thing, None for nothing."""
    tail = b"" if rest is None else pickle.dumps(rest, pickle.HIGHEST_PROTOCOL)
    return b"".join((len(ids).to_bytes(HEAD_BYTES, "little"), ids.tobytes(), tail))


def unpack(message: bytearray) -> tuple[npt.NDArray[np.int32], Any]:
    """Return what `pack` was given."""
    stop = HEAD_BYTES + 4 * int.from_bytes(message[:HEAD_BYTES], "little")
    ids = np.frombuffer(message, np.int32, (stop - HEAD_BYTES) // 4, HEAD_BYTES)
    return ids, pickle.loads(message[stop:]) if stop < len(message) else None


@final
class Link:
    """Sends and receives without waiting, on a communicator of its own. Made collectively."""

    def __init__(self, world: World) -> None:
        self._MPI, self._comm = world.MPI, world.comm.Clone()
        self._status = world.MPI.Status()
        self._leaving: list[Any] = []  # requests, which hold their messages

    def send(self, message: bytes, rank: int, tag: int) -> None:
        """Send a message, and return at once."""
        request = self._comm.Isend([message, self._MPI.BYTE], rank, tag)
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
        found = self._comm.Improbe(MPI.ANY_SOURCE if source < 0 else source, tag, status)
        if found is None:
            return None
        message = bytearray(status.Get_count(MPI.BYTE))
        sender = status.Get_source()
        found.Recv([message, MPI.BYTE])
        return sender, message

    def free(self) -> None:
        """Give the communicator back. Collective."""
        self._comm.Free()
