"""Sparse tensors, as the gradients of embeddings are: values and indices of all ranks, joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpidl.errors import InvalidArgument, RankMismatch
from mpidl.torch import session as sessions
from mpidl.torch.arrays import tensor_of
from mpidl.torch.begin import beginning, prepare
from mpidl.torch.errors import as_internal, internal, on_all
from mpidl.torch.grouped import group_of
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Average, Sum, reduction

if TYPE_CHECKING:
    from mpidl.torch.reduce_op import ReduceOp

Tensor = Any


def sparse_allreduce_async(
    tensor: Tensor,
    name: str | None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Begin to add up sparse tensors (torch.sparse_coo) of one shape; return a handle.

    `op` is Average or Sum. What travels is what the ranks have, not the whole: values and indices
    are gathered. `synchronize` returns a new sparse tensor, coalesced; it raises RankMismatch on
    every rank where shapes differ.
    """
    session = sessions.active()
    with beginning(session, "allgather", name, process_set) as base:
        chosen: ReduceOp = reduction(op, None)
        if not getattr(tensor, "is_sparse", False) or chosen not in (Average, Sum):
            layout = getattr(tensor, "layout", type(tensor).__name__)
            raise InvalidArgument(
                f"sparse_allreduce_async: a tensor of {layout} with {chosen}: expected "
                "torch.sparse_coo, and Average or Sum"
            )
        found = tensor.detach().coalesce()
        # Values come first, under the name itself: a rank with a dense tensor of this name is told.
        values, first = prepare("allgather", found.values(), base, process_set)
        places = found.indices().t()
        _, second = prepare("allgather", places, f"{base}.indices", process_set)
        _, third = prepare("allgather", torch.tensor([found.shape]), f"{base}.shape", process_set)
        first.group = second.group = third.group = group_of(base, process_set)
    with internal():
        handles = session.submit_all([first, second, third])
    divisor = process_set.size() if chosen == Average else 1

    def finish(parts: list[Any]) -> Tensor:
        sizes = zip(process_set.ranks or (), handles[2].sizes or (), strict=True)
        here = [rank for rank, size in sizes if size]  # who has joined has none
        told = {rank: tuple(shape) for rank, shape in zip(here, parts[2].tolist(), strict=True)}
        other = next((rank for rank in here if told[rank] != told[here[0]]), None)
        if other is not None:
            text = f"rank {here[0]}: {told[here[0]]}; rank {other}: {told[other]}"
            raise as_internal(on_all(RankMismatch(f"{first.name!r}: shape: {text}")))
        rows = tensor_of(parts[0], values) / divisor
        columns = tensor_of(parts[1], places).t()
        made = torch.sparse_coo_tensor(
            columns, rows.to(values.dtype), tensor.shape, check_invariants=False
        )
        return made.coalesce().to(tensor.device)

    return session.keep(handles, finish)
