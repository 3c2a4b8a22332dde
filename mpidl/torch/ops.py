"""Collective operations on tensors, asynchronous and in place or not; `synchronize` ends them.

They are known by names: ranks may begin them in any order. What has no name gets one by counting,
so it must come in the same order on all ranks of its process set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpidl.collectives import Request
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import told
from mpidl.torch import session as sessions
from mpidl.torch.arguments import WRONG, factors, text, wholes, writable
from mpidl.torch.arrays import host_array, tensor_of
from mpidl.torch.begin import beginning, copied, number_of, prepare
from mpidl.torch.errors import as_internal, internal
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Average, reduction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpidl.torch.session import Session

Tensor = Any


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin to combine a tensor with those of the other ranks, in place; return a handle.

    `op` is Average (the default), Sum, Min, Max, Product or Adasum; `average=False` is an old way
    to say Sum. The tensor, of any dtype and shape, is multiplied by `prescale_factor` before and
    by `postscale_factor` after. It must not be touched until `synchronize`, which returns it.
    Min and Max of numbers of which one is NaN are NaN, as torch.amin says.

    Here and below, `synchronize` raises on every rank RankMismatch where the ranks' tensors or
    arguments differ, InvalidArgument where they are wrong everywhere; all that is raised is a
    HorovodInternalError, too. What a rank can tell is wrong (no tensor, no such operation or root)
    it raises at once, and the others where they wait. Who gives another name or another process set
    is waited for: the watchdog tells of it.
    """
    session = sessions._session or sessions.active()
    number = getattr(process_set, "process_set_id", None)
    if number is None or process_set._rank is None:
        with internal():
            number = number_of(process_set)
    if name.__class__ is not str:
        with internal():
            name = session.name(number) if name is None else text("name", name)
    finish = problem = None
    try:
        chosen = Average if op is None and average is None else reduction(op, average)
        if prescale_factor.__class__ is not float or postscale_factor.__class__ is not float:
            prescale_factor, postscale_factor, problem = factors(prescale_factor, postscale_factor)
        # The usual tensor comes first: with a thousand small ones, a microsecond counts.
        if tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous():
            array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
            dtype, device = "float32", "cpu"
        else:
            host, array, dtype = host_array(tensor)
            writable(tensor)
            device = tensor.device.type
            if host.data_ptr() != tensor.data_ptr():
                finish = into(tensor, host)
    except (MpidlError, *WRONG):
        with beginning(session, "allreduce", name, process_set):
            reduction(op, average)
            host_array(tensor)  # knows what is wrong with it
            raise
    try:
        # fmt: off
        handle = session.submit(Request(
            name, "allreduce", array, dtype, chosen.name,
            0, prescale_factor, postscale_factor, None, number, None, device, problem,
        ))
        # fmt: on
    except MpidlError as error:
        raise as_internal(error) from error
    session.count = count = session.count + 1
    session.pending[count] = (handle, finish, tensor)
    return count


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Do as `allreduce_async_`, but leave `tensor` alone: `synchronize` returns a new one."""
    return allreduce_async_(
        copied(tensor), average, name, op, prescale_factor, postscale_factor, process_set
    )


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Combine a tensor with those of the other ranks, in place, and return it. Collective."""
    return synchronize(
        allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def allgather_async(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Begin to join the tensors of all ranks along the first dimension; return a handle.

    They may differ in its length. `synchronize` returns a new tensor; of numbers (), a vector.
    """
    session = sessions.active()
    with beginning(session, "allgather", name, process_set) as name:
        _, request = prepare("allgather", tensor, name, process_set, kept=True)
    with internal():
        handle = session.submit(request)
    return session.keep(handle, lambda found: tensor_of(found, tensor))


def broadcast_async_(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin to copy rank `root_rank`'s tensor into those of the others; return a handle.

    The root is a rank of the world, also in a process set. `synchronize` returns `tensor`.
    """
    session = sessions.active()
    with beginning(session, "broadcast", name, process_set) as name:
        host, request = prepare("broadcast", tensor, name, process_set)
        request.root = process_set.place(root_rank)
    with internal():
        handle = session.submit(request)
    return session.keep(handle, into(tensor, host))


def broadcast_async(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Do as `broadcast_async_`, but leave `tensor` alone: `synchronize` returns a new one."""
    return broadcast_async_(copied(tensor), root_rank, name, process_set)


def broadcast_(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Copy rank `root_rank`'s tensor into those of the others, and return it. Collective."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin to send rows to each rank, and to receive rows from each; return a handle.

    `splits` (ranks,) are the numbers of rows for the ranks of the set, in order; None: equally
    many for each. `synchronize` returns what has arrived, in the order of ranks; with `splits`, a
    pair of that and the numbers of rows (ranks,) int32 from each.
    """
    session = sessions.active()
    with beginning(session, "alltoall", name, process_set) as name:
        _, request = prepare("alltoall", tensor, name, process_set, kept=True)
        if splits is not None:
            request.splits = tuple(wholes("splits", splits))
    with internal():
        handle = session.submit(request)

    def finish(found: Any) -> Any:
        received = tensor_of(found, tensor)
        if splits is None:
            return received
        return received, torch.tensor(handle.sizes, dtype=torch.int32)

    return session.keep(handle, finish)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Begin to combine tensors, each rank getting a part of the rows; return a handle.

    `op` is Average or Sum. The parts are as equal as can be, the first ones longer by a row.
    """
    session = sessions.active()
    with beginning(session, "reducescatter", name, process_set) as name:
        _, request = prepare("reducescatter", tensor, name, process_set, kept=True)
        request.op = reduction(op, None).name
        request.scale(*factors(prescale_factor, postscale_factor))
    with internal():
        handle = session.submit(request)
    return session.keep(handle, lambda found: tensor_of(found, tensor))


def poll(handle: int) -> bool:
    """Return whether `synchronize` would return at once. Not collective."""
    session = sessions.active()
    handles = find(session, handle)[0]
    several = handles if type(handles) is list else [handles]
    return all(session.engine.poll(each) for each in several)


def synchronize(handle: int) -> Any:
    """Wait for the end of an operation, and return its result; once for each handle."""
    session = sessions._session or sessions.active()
    handles, finish, tensor = find(session, handle)
    del session.pending[handle]
    try:
        if type(handles) is list:
            found: Any = [session.wait(each) for each in handles]
        else:
            found = session.wait(handles)
    except MpidlError as error:
        raise as_internal(error) from error
    return tensor if finish is None else finish(found)


def join(device: int = -1) -> int:  # noqa: ARG001
    """Say that this rank has no more data, and wait until all have said so. Collective.

    Until then it takes part, with zeros, in what the others do: an average still divides by the
    number of all ranks. Of allgather it has no rows. What cannot be done so raises RankMismatch on
    all the others, with one text: Min, Max and Product, which zeros would spoil, alltoall, a
    broadcast from here, adding or removing a process set. Returns the rank that joined last.
    `device` is there for Horovod's sake.
    """
    session = sessions.active()
    with internal():
        last = session.engine.join()
    session.count_anew()
    return last


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait for all ranks of the set. Collective."""
    session = sessions.active()
    with internal():
        number = number_of(process_set)
        name = session.name(number)
        session.wait(session.submit(Request(name, "barrier", None, process_set=number)))


def find(session: Session, handle: int) -> Any:
    """Return what is pending under a handle. Raises InvalidArgument if nothing is."""
    found = session.pending.get(handle) if handle.__class__ is int else None
    if found is None:
        raise InvalidArgument(f"handle {told(handle)} is unknown, or was synchronized already")
    return found


def into(tensor: Tensor, host: Tensor) -> Callable[[Any], Tensor]:
    """Return what brings a result from host memory back to the tensor, if that is elsewhere."""
    here = host.data_ptr() == tensor.data_ptr() and host.device == tensor.device

    def finish(_: Any) -> Tensor:
        if not here:
            with torch.no_grad():
                tensor.copy_(host)
        return tensor

    return finish
