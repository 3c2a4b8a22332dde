"""Operations on lists of tensors, which begin together: when all of them are there on all ranks."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument
from mpidl.torch import session as sessions
from mpidl.torch.arrays import tensor_of
from mpidl.torch.errors import internal
from mpidl.torch.ops import fresh, into, number_of, prepare, synchronize
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Average, reduction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensor = Any


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin `allreduce_async_` for each tensor; return one handle, whose result is the list."""
    with internal():
        chosen = reduction(op, average).name
    scales = (prescale_factor, postscale_factor)
    return _begin("allreduce", tensors, name, process_set, into, chosen, scales)


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Do as `grouped_allreduce_async_`, but leave `tensors` alone."""
    copies = [fresh(tensor) for tensor in tensors]
    return grouped_allreduce_async_(
        copies, average, name, op, prescale_factor, postscale_factor, process_set
    )


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Combine each tensor with those of the other ranks, in place. Collective."""
    found: list[Tensor] = synchronize(
        grouped_allreduce_async_(
            tensors, average, name, op, prescale_factor, postscale_factor, process_set
        )
    )
    return found


def grouped_allgather_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin `allgather_async` for each tensor; return one handle, whose result is a list."""
    return _begin("allgather", tensors, name, process_set, _made)


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Begin `reducescatter_async` for each tensor; return one handle, whose result is a list."""
    with internal():
        chosen = reduction(op, None).name
    scales = (prescale_factor, postscale_factor)
    return _begin("reducescatter", tensors, name, process_set, _made, chosen, scales)


def _begin(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    finisher: Callable[[Tensor, Tensor], Callable[[Any], Tensor]],
    op: str = "sum",
    scales: tuple[float, float] = (1.0, 1.0),
) -> int:
    session = sessions.active()
    with internal():
        if not tensors:
            raise InvalidArgument(f"grouped {kind}: expected at least one tensor")
        base = session.name(number_of(process_set)) if name is None else name
        names = [f"{base}.{i}" for i in range(len(tensors))]
        rows = kind != "allreduce"
        pairs = [
            prepare(session, kind, tensor, each, process_set, rows=rows)
            for tensor, each in zip(tensors, names, strict=True)
        ]
        group = group_of(base, process_set)
        for _, request in pairs:
            request.op, request.group = op, group
            request.prescale, request.postscale = scales
        handles = session.submit_all([request for _, request in pairs])
    finishers = [finisher(tensor, pair[0]) for tensor, pair in zip(tensors, pairs, strict=True)]

    def finish(found: list[Any]) -> list[Tensor]:
        return [end(each) for end, each in zip(finishers, found, strict=True)]

    return session.keep(handles, finish)


def group_of(name: str, process_set: ProcessSet) -> int:
    """Return a number for a group, the same on all ranks, in whatever order groups begin."""
    text = f"{process_set.process_set_id} {name}"
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


def _made(tensor: Tensor, _: Tensor) -> Callable[[Any], Tensor]:
    return lambda found: tensor_of(found, tensor)
