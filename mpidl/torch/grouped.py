"""Operations on lists of tensors, which begin together: when all of them are there on all ranks."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from mpidl.torch import session as sessions
from mpidl.torch.arguments import factors, several
from mpidl.torch.arrays import tensor_of
from mpidl.torch.begin import beginning, fresh, prepare
from mpidl.torch.errors import internal
from mpidl.torch.ops import into, synchronize
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Average, Sum, reduction

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
    scales = (prescale_factor, postscale_factor)
    return _begin("allreduce", tensors, name, process_set, into, (op, average), scales)


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
    scales = (prescale_factor, postscale_factor)
    return _begin("allreduce", tensors, name, process_set, into, (op, average), scales, copy=True)


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
    scales = (prescale_factor, postscale_factor)
    return _begin("reducescatter", tensors, name, process_set, _made, (op, None), scales)


def _begin(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    finisher: Callable[[Tensor, Tensor], Callable[[Any], Tensor]],
    op: tuple[int | None, bool | None] = (Sum, None),
    scales: tuple[float, float] = (1.0, 1.0),
    *,
    copy: bool = False,
) -> int:
    session = sessions.active()
    with beginning(session, kind, name, process_set, grouped=True) as base:
        tensors = several(f"grouped {kind}", tensors)
        chosen = reduction(*op).name
        if copy:
            tensors = [fresh(tensor) for tensor in tensors]
        pairs = [
            prepare(kind, tensor, f"{base}.{i}", process_set, kept=kind != "allreduce")
            for i, tensor in enumerate(tensors)
        ]
        group = group_of(base, process_set)
        for _, request in pairs:
            request.op, request.group = chosen, group
            request.scale(*factors(*scales))
    with internal():
        handles = session.submit_all([request for _, request in pairs])
    finishers = [finisher(tensor, pair[0]) for tensor, pair in zip(tensors, pairs, strict=True)]

    def finish(found: list[Any]) -> list[Tensor]:
        return [end(each) for end, each in zip(finishers, found, strict=True)]

    return session.keep(handles, finish)


def group_of(name: str, process_set: ProcessSet) -> int:
    """Return a number for a group, the same on all ranks, in whatever order groups begin."""
    text = f"{process_set.process_set_id} {name}"
    return int.from_bytes(
        blake2b(text.encode("utf-8", "backslashreplace"), digest_size=7).digest(), "little"
    )


def _made(tensor: Tensor, _: Tensor) -> Callable[[Any], Tensor]:
    return lambda found: tensor_of(found, tensor)
