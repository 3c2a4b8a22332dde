"""How an operation begins: with its request, or with word to those that wait that it cannot."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mpidl.collectives import Request
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import told
from mpidl.torch import session as sessions
from mpidl.torch.arguments import WRONG, dense, ours, text, writable
from mpidl.torch.arrays import host_array
from mpidl.torch.errors import internal
from mpidl.torch.process_sets import ProcessSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.torch.session import Session

Tensor = Any


def number_of(process_set: ProcessSet) -> int:
    """Return the id of a set. Raises InvalidArgument where this rank cannot use it."""
    if not isinstance(process_set, ProcessSet):
        raise InvalidArgument(f"process_set={told(process_set)}: expected a ProcessSet")
    number = process_set.process_set_id
    if number is None:
        raise InvalidArgument(f"{process_set}: expected a set that has been added, after init()")
    if process_set._rank is None:
        raise InvalidArgument(f"{process_set}: this rank, {sessions.rank()}, is not in it")
    return number


@contextmanager
def beginning(
    session: Session, kind: str, name: str | None, process_set: ProcessSet, grouped: bool = False
) -> Iterator[str]:
    """Yield the name of an operation, and let what is raised be told to those that wait for it.

    Of what is `grouped` they wait for the first one under the name. In this context no rank is
    waited for. It raises HorovodInternalError.
    """
    with internal():
        number = number_of(process_set)
        name = session.name(number) if name is None else text("name", name)
        try:
            yield name
        except (MpidlError, *WRONG) as error:
            known = ours(error)
            session.refuse(name + ".0" * grouped, kind, number, known)
            raise known from error


def prepare(
    kind: str, tensor: Tensor, name: str, process_set: ProcessSet, *, kept: bool = False
) -> tuple[Tensor, Request]:
    """Return the tensor in host memory, and a request for it.

    One that is `kept` is not written to; a number () is one row then.
    """
    number = number_of(process_set)
    host, array, dtype = host_array(tensor)
    if not kept:
        writable(tensor)
    elif not host.ndim:
        array = array.reshape(1)
    device = tensor.device.type
    return host, Request(name, kind, array, dtype, process_set=number, device=device)


def fresh(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, which knows no gradient. Raises InvalidArgument."""
    dense(tensor)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy; where there can be none, what it was: the operation refuses it."""
    try:
        return fresh(tensor)
    except (MpidlError, *WRONG):
        return tensor
