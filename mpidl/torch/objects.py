"""Any Python objects between ranks: pickled, and sent as bytes."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpidl.torch import session as sessions
from mpidl.torch.ops import allgather_async, broadcast_, number_of, synchronize
from mpidl.torch.process_sets import ProcessSet, global_process_set

if TYPE_CHECKING:
    from collections.abc import Callable


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return rank `root_rank`'s object, a copy of it on the other ranks. Collective.

    Tensors in it arrive on the CPU if they cannot be where they were.
    """
    name = name or sessions.active().name(number_of(process_set))
    root = sessions.rank() == root_rank
    data = _pickled(obj) if root else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(data)])
    broadcast_(length, root_rank, f"{name}.length", process_set)
    if not root:
        data = torch.empty(int(length), dtype=torch.uint8)
    broadcast_(data, root_rank, f"{name}.object", process_set)
    return obj if root else _unpickled(data)


def broadcast_object_fn(
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """Return `broadcast_object` with these arguments, a function of the object alone."""

    def broadcast(obj: Any = None) -> Any:
        return broadcast_object(obj, root_rank, name, process_set)

    return broadcast


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return the objects of all ranks of the set, by rank. Collective."""
    handle = allgather_async(_pickled(obj), name, process_set)
    part = sessions.active().pending[handle][0]
    data = synchronize(handle)
    return [_unpickled(each) for each in data.split(list(part.sizes))]


def _pickled(obj: Any) -> Any:
    """Return a uint8 tensor (bytes,)."""
    file = io.BytesIO()
    pickle.dump(obj, file, pickle.HIGHEST_PROTOCOL)
    return torch.from_numpy(np.frombuffer(file.getbuffer(), np.uint8))


def _unpickled(data: Any) -> Any:
    return pickle.loads(data.numpy())
