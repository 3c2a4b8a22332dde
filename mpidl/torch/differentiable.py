"""The blocking operations, through which gradients flow.

Gradients are Horovod's. Those of allreduce and alltoall are derivatives of the sum of the ranks'
losses; those of allgather and broadcast, which copy, of their mean; that of reducescatter is the
gathered gradient, times the number of ranks after a Sum.
Each backward is a collective like its forward: all ranks of the set must run it, in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mpidl.errors import InvalidArgument
from mpidl.torch import session as sessions
from mpidl.torch.arguments import compressor, several
from mpidl.torch.begin import beginning
from mpidl.torch.compression import Compression
from mpidl.torch.grouped import (
    grouped_allgather_async,
    grouped_allreduce_async,
    grouped_reducescatter_async,
)
from mpidl.torch.ops import (
    allgather_async,
    allreduce_async,
    alltoall_async,
    broadcast_async,
    reducescatter_async,
    synchronize,
)
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Adasum, Average, Sum, reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.torch.reduce_op import ReduceOp

Tensor = Any


class _AllReduce(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, options: _Reduction, name: str | None, *tensors: Tensor) -> Any:
        ctx.options = options
        return options.allreduce(tensors, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.options.chosen not in (Average, Sum, Adasum):
            raise InvalidArgument(f"allreduce with {ctx.options.chosen} has no gradient")
        return None, None, *ctx.options.allreduce(grads, None)


class _ReduceScatter(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, options: _Reduction, name: str | None, *tensors: Tensor) -> Any:
        ctx.options = options
        return options.reducescatter(tensors, name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        options = ctx.options
        scale = float(options.prescale) * float(options.postscale)
        if options.chosen == Sum:
            scale *= options.process_set.size()
        handle = grouped_allgather_async([g * scale for g in grads], None, options.process_set)
        return None, None, *synchronize(handle)


class _AllGather(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, grouped: bool, process_set: ProcessSet, name: str | None, *tensors: Tensor
    ) -> Any:
        ctx.process_set = process_set
        if grouped:
            handle = grouped_allgather_async(tensors, name, process_set)
            parts = sessions.active().pending[handle][0]
            found = synchronize(handle)
        else:
            handle = allgather_async(tensors[0], name, process_set)
            parts = [sessions.active().pending[handle][0]]
            found = [synchronize(handle)]
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.starts = [sum(part.sizes[: process_set.rank()]) for part in parts]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        means = synchronize(grouped_allreduce_async(grads, op=Average, process_set=ctx.process_set))
        mine = [
            mean[start : start + (shape[0] if shape else 1)].reshape(shape)
            for mean, start, shape in zip(means, ctx.starts, ctx.shapes, strict=True)
        ]
        return None, None, None, *mine


class _Broadcast(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> Tensor:
        ctx.root_rank, ctx.process_set = root_rank, process_set
        return synchronize(broadcast_async(tensor, root_rank, name, process_set))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mean = synchronize(allreduce_async(grad, op=Average, process_set=ctx.process_set))
        if sessions.rank() != ctx.root_rank:
            mean = torch.zeros_like(mean)
        return mean, None, None, None


class _AllToAll(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, splits: Any, name: str | None, process_set: ProcessSet
    ) -> Any:
        handle = alltoall_async(tensor, splits, name, process_set)
        part = sessions.active().pending[handle][0]
        found = synchronize(handle)
        ctx.received, ctx.process_set = part.sizes, process_set
        if splits is not None:
            ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        found, _ = synchronize(alltoall_async(grad, ctx.received, None, ctx.process_set))
        return found, None, None, None


@dataclass(frozen=True)
class _Reduction:
    """How to combine tensors."""

    op: Any
    average: Any
    prescale: float
    postscale: float
    process_set: ProcessSet
    grouped: bool  #: whether as a group, if only of one

    @property
    def chosen(self) -> ReduceOp:
        """The operation that is meant."""
        return reduction(self.op, self.average)

    def allreduce(self, tensors: Sequence[Tensor], name: str | None) -> tuple[Tensor, ...]:
        scales = (self.prescale, self.postscale)
        options = (self.average, name, self.op, *scales, self.process_set)
        if not self.grouped:
            handle = allreduce_async(tensors[0], *options)
            return (synchronize(handle),)
        handle = grouped_allreduce_async(tensors, *options)
        return tuple(synchronize(handle))

    def reducescatter(self, tensors: Sequence[Tensor], name: str | None) -> tuple[Tensor, ...]:
        scales = (self.prescale, self.postscale)
        if not self.grouped:
            handle = reducescatter_async(tensors[0], name, self.op, self.process_set, *scales)
            return (synchronize(handle),)
        handle = grouped_reducescatter_async(tensors, name, self.op, self.process_set, *scales)
        return tuple(synchronize(handle))


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Return a tensor combined with those of the other ranks. Collective.

    As `allreduce_async_`, but `tensor` stays as it is; `compression` narrows what travels.
    Differentiable for Average and Sum, by the same operation on the gradients.
    """
    options = _Reduction(op, average, prescale_factor, postscale_factor, process_set, grouped=False)
    return _compressed(_AllReduce, options, [tensor], name, compression)[0]


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Return each tensor combined with those of the other ranks, as `allreduce`. Collective."""
    options = _Reduction(op, average, prescale_factor, postscale_factor, process_set, grouped=True)
    return _compressed(_AllReduce, options, tensors, name, compression)


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Return this rank's rows of the combined tensors, as `reducescatter_async`. Collective."""
    options = _Reduction(op, None, prescale_factor, postscale_factor, process_set, grouped=False)
    return _compressed(_ReduceScatter, options, [tensor], name, compression)[0]


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Return this rank's rows of each of the combined tensors. Collective."""
    options = _Reduction(op, None, prescale_factor, postscale_factor, process_set, grouped=True)
    return _compressed(_ReduceScatter, options, tensors, name, compression)


def allgather(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return the tensors of all ranks, joined along the first dimension. Collective.

    As `allgather_async`. The gradient is this rank's part of the mean of all ranks' gradients.
    """
    return _AllGather.apply(False, process_set, name, tensor)[0]


def grouped_allgather(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Return, for each tensor, those of all ranks, joined as by `allgather`. Collective."""
    with beginning(sessions.active(), "allgather", name, process_set, grouped=True) as name:
        tensors = several("grouped_allgather", tensors)
    return list(_AllGather.apply(True, process_set, name, *tensors))


def broadcast(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Return rank `root_rank`'s tensor. Collective.

    The root's gradient is the mean of all ranks' gradients; that of the others is 0.
    """
    return _Broadcast.apply(tensor, root_rank, name, process_set)


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows to each rank, and return those from each, as `alltoall_async`. Collective.

    Gradients go the way back.
    """
    return _AllToAll.apply(tensor, splits, name, process_set)


def _compressed(
    function: Any,
    options: _Reduction,
    tensors: Sequence[Tensor],
    name: str | None,
    compression: Any,
) -> list[Tensor]:
    kind = "allreduce" if function is _AllReduce else "reducescatter"
    begin = beginning(sessions.active(), kind, name, options.process_set, options.grouped)
    with begin as name:
        pairs = [compressor(compression).compress(each) for each in several(kind, tensors)]
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise InvalidArgument(f"compress of {compression}: expected a tensor and a context")
    found = function.apply(options, name, *(narrow for narrow, _ in pairs))
    return [compression.decompress(each, ctx) for each, (_, ctx) in zip(found, pairs, strict=True)]
