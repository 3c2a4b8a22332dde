"""Any Python objects between ranks: pickled, and sent as bytes."""

from __future__ import annotations

import importlib
import io
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mpidl.errors import InvalidArgument, MpidlError
from mpidl.torch import session as sessions
from mpidl.torch.begin import beginning
from mpidl.torch.errors import internal, on_all
from mpidl.torch.ops import allgather_async, broadcast_, synchronize
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

    What pickle cannot take, cloudpickle does, if it is installed; raises InvalidArgument on every
    rank if neither can, and where what was pickled cannot be unpickled. Tensors in it arrive on the
    CPU if they cannot be where they were.
    """
    session = sessions.active()
    with beginning(session, "broadcast", name, process_set) as base:
        name = base
    root = False
    with suppress(MpidlError):  # the broadcast tells it to all
        root = process_set.place(root_rank) == process_set._rank
    problem, data = None, torch.empty(0, dtype=torch.uint8)
    if root:
        data, problem = _pickled(obj)
    length = torch.tensor([len(data)])
    broadcast_(length, root_rank, f"{name}.length", process_set)
    if not root:
        data = torch.empty(int(length), dtype=torch.uint8)
    broadcast_(data, root_rank, f"{name}.object", process_set)
    # the root's, too: some objects can be pickled only, and all ranks are to know
    found = problem or _unpickled(data)
    _check([found], "broadcast_object")
    return obj if root else found


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
    """Return the objects of all ranks of the set, by rank. Collective.

    As in `broadcast_object`; ranks that have joined are left out.
    """
    handle = allgather_async(_pickled(obj)[0], name, process_set)
    part = sessions.active().pending[handle][0]
    data = synchronize(handle)
    found = [_unpickled(each) for each in data.split(list(part.sizes)) if len(each)]
    _check(found, "allgather_object")
    return found


class _Problem(NamedTuple):
    """What travels in place of an object that cannot."""

    text: str


def _pickled(obj: Any) -> tuple[Any, _Problem | None]:
    """Return a uint8 tensor (bytes,), and what was wrong, if anything: then it holds that."""
    problem = None
    try:
        data = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:  # it takes functions without a name, and what is local to one
            data = importlib.import_module("cloudpickle").dumps(obj)
        except Exception:
            kind = type(obj).__name__
            problem = _Problem(f"rank {sessions.rank()}: {kind}: {type(error).__name__}: {error}")
            data = pickle.dumps(problem)
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)), problem


def _check(found: list[Any], what: str) -> None:
    """Raise on all ranks InvalidArgument where an object could not be pickled."""
    problems = [each.text for each in found if isinstance(each, _Problem)]
    if problems:
        with internal():
            text = f"{what}: an object that cannot be pickled: {problems[0]}"
            raise on_all(InvalidArgument(text))


def _unpickled(data: Any) -> Any:
    try:
        return _Unpickler(io.BytesIO(data.numpy())).load()
    except Exception as error:  # its class, or torch, knows no better
        with internal():
            text = f"an object that cannot be unpickled: {type(error).__name__}: {error}"
            raise InvalidArgument(text) from error


class _Unpickler(pickle.Unpickler):
    """Brings tensors to the CPU, if what they were on is not here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_from_bytes
        return super().find_class(module, name)


def _load_from_bytes(data: bytes) -> Any:
    def load(place: Any) -> Any:
        return torch.load(io.BytesIO(data), map_location=place, weights_only=False)

    try:
        return load(None)
    except RuntimeError:
        return load("cpu")
