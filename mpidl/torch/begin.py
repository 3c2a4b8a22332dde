"""How an operation begins: with its request, or with word to those that wait that it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpidl.collectives import Request
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import told
from mpidl.torch import session as sessions
from mpidl.torch.arguments import WRONG, dense, ours, text, writable
from mpidl.torch.arrays import host_array
from mpidl.torch.errors import as_internal
from mpidl.torch.process_sets import ProcessSet

if TYPE_CHECKING:
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


class beginning:  # noqa: N801
    """A context in which an operation begins: what is raised is told to those that wait for it.

    It gives the operation's name. Of what is `grouped` others wait for the first one under the
    name. In this context no rank is waited for. It raises HorovodInternalError.
    """

    __slots__ = ("grouped", "kind", "name", "number", "process_set", "session")

    def __init__(
        self,
        session: Session,
        kind: str,
        name: str | None,
        process_set: ProcessSet,
        grouped: bool = False,
    ) -> None:
        self.session, self.kind, self.name = session, kind, name
        self.process_set, self.grouped = process_set, grouped

    def __enter__(self) -> str:
        try:
            self.number = number_of(self.process_set)
            if self.name is None:
                self.name = self.session.name(self.number)
            else:
                self.name = text("name", self.name)
        except MpidlError as error:
            raise as_internal(error) from error
        return self.name

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, (MpidlError, *WRONG)):
            return
        known = ours(error)
        self.session.refuse(f"{self.name}" + ".0" * self.grouped, self.kind, self.number, known)
        raise as_internal(known) from error


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
