"""Messages between the ranks and the coordinator: ids as an array, all else pickled."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

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
