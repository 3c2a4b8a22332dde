"""The gradients of an optimizer, on their way to the other ranks as backward computes them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mpidl.errors import InvalidArgument
from mpidl.torch import session as sessions
from mpidl.torch.grouped import grouped_allreduce_async_
from mpidl.torch.ops import allreduce_, allreduce_async_, synchronize
from mpidl.torch.reduce_op import Sum
from mpidl.torch.sparse import sparse_allreduce_async

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpidl.torch.process_sets import ProcessSet
    from mpidl.torch.reduce_op import ReduceOp

Tensor = Any


@dataclass(slots=True, eq=False)
class Slot:
    """One parameter."""

    param: Tensor
    name: str
    passes: int  #: backward passes to come, before its gradient is complete
    group: Group
    hook: Any = None
    travels: Tensor = None  #: what was sent of the gradient
    context: Any = None  #: the compressor's
    sparse_dims: int = 0  #: of its gradients, if they are sparse


@dataclass(slots=True, eq=False)
class Group:
    """Parameters whose gradients begin together: usually one."""

    slots: list[Slot] = field(default_factory=list)
    ready: int = 0  #: complete gradients
    needed: int = 0  #: of those that are not frozen
    handles: list[tuple[int, list[Slot]]] = field(default_factory=list)  #: if they have begun


def _ready(of: weakref.ref[Averages], param: Tensor) -> None:
    """Be told of a gradient; a hook outlives its optimizer if the parameter does."""
    gradients = of()
    if gradients is not None and not gradients.alone:
        gradients.ready(gradients._slots[id(param)])


class Averages:
    """Averages the gradients of an optimizer's parameters; see `DistributedOptimizer`."""

    def __init__(
        self,
        prefix: str,
        names: dict[int, str],
        groups: Sequence[Sequence[Tensor]],
        compression: Any,
        passes: int,
        op: ReduceOp,
        predivide: float,
        sparse_as_dense: bool,
        process_set: ProcessSet,
    ) -> None:
        self.prefix, self.names, self.compression = prefix, names, compression
        self.op, self.predivide, self.passes = op, predivide, passes
        self.sparse_as_dense, self.process_set = sparse_as_dense, process_set
        self.done = False  #: whether the gradients are averaged, and none is new since
        self.steps = 0  #: how often they were averaged
        self.skip = False  #: whether `step` is to take them as they are
        self._slots: dict[int, Slot] = {}  # by id of the parameter
        self._groups: list[Group] = []
        self._begun: list[Group] = []
        for i, params in enumerate(groups):
            for j, param in enumerate(params):
                names.setdefault(id(param), f"{prefix}.group{i}.{j}")
            self._add(Group(), params)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to average with."""
        return self.process_set._rank is None or self.process_set.size() == 1

    @property
    def begun(self) -> bool:
        """Whether gradients are on their way."""
        return bool(self._begun)

    @property
    def taken(self) -> set[str]:
        """The names of gradients, and what those by place begin with."""
        return {self.prefix, *(slot.name for slot in self._slots.values())}

    def watch(self, param_groups: Iterable[dict[str, Any]], begin: bool = True) -> None:
        """Take in new parameters, and `begin` with each gradient as soon as it is there.

        Those without a name get one by place.
        """
        for i, group in enumerate(param_groups):
            for j, param in enumerate(group["params"]):
                if id(param) not in self._slots:
                    self.names.setdefault(id(param), f"{self.prefix}.{i}.{j}")
                    self._add(Group(), [param])
                slot = self._slots[id(param)]
                if begin and slot.hook is None and param.requires_grad:
                    hook = partial(_ready, weakref.ref(self))
                    slot.hook = param.register_post_accumulate_grad_hook(hook)

    def finish(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Wait until all gradients are averaged; what nobody computed is 0. Collective."""
        if not self.alone:
            self.watch(param_groups)
            try:
                for group in self._groups:
                    if not group.handles and any(slot.param.requires_grad for slot in group.slots):
                        self._begin(group)
                for group in self._begun:
                    for handle, slots in group.handles:
                        self._take(slots, synchronize(handle))
            finally:
                self.forget()
        self.done = True

    def forget(self) -> None:
        """Wait for nothing that is on its way. Not collective."""
        pending = {} if sessions._session is None else sessions._session.pending
        for group in self._begun:
            for handle, _ in group.handles:
                pending.pop(handle, None)  # it would hold its tensors
            group.handles = []
            for slot in group.slots:
                slot.travels = slot.context = None
        self._begun.clear()
        self.count_anew()

    def count_anew(self) -> None:
        """Expect all backward passes again."""
        for group in self._groups:
            group.ready = 0
            for slot in group.slots:
                slot.passes = self.passes

    def mean(self, loss: Any) -> Any:
        """Return the mean over ranks of a loss, a number or a tensor. Collective."""
        if loss is None or self.alone:
            return loss
        value = torch.as_tensor(loss).detach().clone()
        mean = allreduce_(value, name=f"{self.prefix}.loss", process_set=self.process_set)
        return mean if isinstance(loss, torch.Tensor) else mean.item()

    def _add(self, group: Group, params: Iterable[Tensor]) -> None:
        for param in params:
            slot = Slot(param, self.names[id(param)], self.passes, group)
            self._slots[id(param)] = slot
            group.slots.append(slot)
        self._groups.append(group)

    def ready(self, slot: Slot) -> None:
        """Note that a backward pass has computed a gradient, or a part of it."""
        if slot.passes == 0:
            raise InvalidArgument(
                f"{slot.name}: a backward pass more than backward_passes_per_step="
                f"{self.passes} before step(): call step() or zero_grad() between, or let it be "
                "more passes"
            )
        self.done = False
        slot.passes -= 1
        if slot.passes == 0:
            group = slot.group
            if not group.ready:
                group.needed = sum(each.param.requires_grad for each in group.slots)
            group.ready += 1
            if group.ready == group.needed:
                self._begin(group)

    def _begin(self, group: Group) -> None:
        dense = []
        self._begun.append(group)
        for slot in group.slots:
            slot.passes = 0
            if not slot.param.requires_grad:  # frozen: a gradient of 0 would let it decay
                continue
            if self._is_dense(slot):
                dense.append(slot)
            else:
                handle = sparse_allreduce_async(
                    slot.param.grad, slot.name, self.op, self.process_set
                )
                group.handles.append((handle, [slot]))
        if dense:
            group.handles.append((self._send(dense), dense))

    def _is_dense(self, slot: Slot) -> bool:
        """Prepare what is to travel. A parameter without gradient here may have one elsewhere."""
        grad = slot.param.grad
        if grad is None and slot.sparse_dims and not self.sparse_as_dense:
            shape = slot.param.shape
            places = torch.empty(slot.sparse_dims, 0, dtype=torch.int64, device=slot.param.device)
            values = slot.param.new_empty(0, *shape[slot.sparse_dims :])
            grad = slot.param.grad = torch.sparse_coo_tensor(
                places, values.detach(), shape, check_invariants=False
            )
        elif grad is None:
            grad = slot.param.grad = torch.zeros_like(slot.param)
        if grad.is_sparse:
            slot.sparse_dims = grad.sparse_dim()
            if not self.sparse_as_dense:
                return False
            grad = grad.to_dense()
        slot.travels, slot.context = self.compression.compress(grad)
        return True

    def _send(self, slots: list[Slot]) -> int:
        op, before, after = self.op, 1.0, 1.0
        if self.predivide != 1.0:
            op, before = Sum, 1 / self.predivide
            after = self.predivide / (self.process_set.size() or 1)
        options = (op, before, after, self.process_set)
        if len(slots) == 1:
            return allreduce_async_(slots[0].travels, None, slots[0].name, *options)
        name = f"{slots[0].name} and {len(slots) - 1} more"
        return grouped_allreduce_async_([slot.travels for slot in slots], None, name, *options)

    def _take(self, slots: list[Slot], found: Any) -> None:
        """Put averaged gradients in their places."""
        for slot, each in zip(slots, found if len(slots) > 1 else [found], strict=True):
            param = slot.param
            if each.is_sparse:
                param.grad = each
                continue
            mean = self.compression.decompress(each, slot.context)
            if slot.sparse_dims:
                param.grad = mean.to_sparse(slot.sparse_dims)
            elif mean is not param.grad:
                param.grad.copy_(mean)
