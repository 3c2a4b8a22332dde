"""`DistributedOptimizer`: any optimizer of torch.optim, on gradients averaged over ranks."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from mpidl import clock
from mpidl.errors import InvalidArgument
from mpidl.refuse import told, whole
from mpidl.torch.adasum import AdasumSteps
from mpidl.torch.arguments import WRONG, compressor, each_once, flag, number
from mpidl.torch.arguments import groups as of_groups
from mpidl.torch.averages import Averages
from mpidl.torch.compression import Compression
from mpidl.torch.process_sets import ProcessSet, global_process_set
from mpidl.torch.reduce_op import Adasum, Average, reduction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Tensor = Any

_live: weakref.WeakSet[Averages] = weakref.WeakSet()


def DistributedOptimizer(
    optimizer: Any,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return `optimizer` as one that averages gradients over ranks before each step.

    It is an instance of the optimizer's class, with its groups and state. Each gradient begins its
    way while backward still computes others; `step` waits for all, and is collective. A gradient
    that this rank did not compute counts as 0.

    To change averaged gradients before the step (clipping, say), call `synchronize` before; `step`
    then averages nothing a second time, in `skip_synchronize` or not. Whoever reads `param_groups`,
    as a GradScaler does, also finds averaged gradients. A closure is called with all of this in
    it: its gradients and its loss are averaged each time, so that a line search goes the same way
    on every rank.

    Args:
        optimizer: any of torch.optim, or like them.
        named_parameters: names and parameters, all that the optimizer has, and perhaps more;
            None: they are named by their place.
        compression: what narrows gradients on their way, see `Compression`.
        backward_passes_per_step: so many passes add to the gradients before they are averaged.
        op: Average, Sum, or Adasum, which lets each rank make its own step, and combines these.
        gradient_predivide_factor: with Average, gradients are divided by it before they are added
            up, and by ranks / factor after: against overflow in 16 bits.
        num_groups: an old name for a number of `groups`.
        groups: so many groups of gradients, or lists of their parameters: a group begins when all
            of it is there.
        sparse_as_dense: sparse gradients travel as dense ones; without it, as values and indices.
        process_set: the ranks to average over; on others the optimizer works alone.

    Raises InvalidArgument, a ValueError, for names that are missing or not unique, and for values
    that cannot be.
    """
    of_groups(optimizer)
    op = reduction(op, None)
    number("gradient_predivide_factor", gradient_predivide_factor)
    if gradient_predivide_factor != 1.0 and op != Average:
        raise InvalidArgument("gradient_predivide_factor: expected op=Average with it")
    if gradient_predivide_factor <= 0:
        raise InvalidArgument(f"{gradient_predivide_factor=}: expected more than 0")
    whole("backward_passes_per_step", backward_passes_per_step, 1)
    flag("sparse_as_dense", sparse_as_dense)
    compressor(compression)
    if not isinstance(process_set, ProcessSet):
        raise InvalidArgument(f"process_set={told(process_set)}: expected a ProcessSet")
    mixin: Any = AdasumSteps if op == Adasum else _Averaged
    kind = type(optimizer)
    made: Any = object.__new__(type(kind.__name__, (mixin, kind), {}))
    # A scheduler that knows `optimizer` has put its `step` there: it is not this one's.
    made.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    prefix, names = _names(optimizer, named_parameters, process_set)
    made._averages = Averages(
        prefix=prefix,
        names=names,
        groups=_groups(optimizer, groups if groups is not None else num_groups),
        compression=compression,
        passes=backward_passes_per_step,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    made._averages.watch(made.param_groups, begin=op != Adasum)
    _live.add(made._averages)
    return made


class _Averaged:
    """What an optimizer gets besides its own."""

    _averages: Averages

    @property
    def param_groups(self) -> Any:
        """The groups. Where gradients are on their way, this waits for them, and is collective."""
        if self._averages.begun:
            self.synchronize()
        return self.__dict__["param_groups"]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.__dict__["param_groups"] = groups

    def synchronize(self) -> None:
        """Wait until all gradients are averaged. Collective.

        Those that no backward has computed here take part as zeros. Raises on every rank
        HorovodInternalError where gradients differ in shape or dtype between ranks.
        """
        clock.switch(clock.REDUCE)
        try:
            self._averages.finish(self.__dict__["param_groups"])
        finally:
            clock.switch(clock.COMPUTE)  # what follows, unless it says otherwise
        clock.step(self._averages.steps)
        self._averages.steps += 1

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` in this context take the gradients as they are. Not collective."""
        self._averages.skip = True
        try:
            yield
        finally:
            self._averages.skip = False

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Average the gradients, unless `synchronize` did, and make the step. Collective."""
        averages = self._averages
        if averages.skip:
            averages.done = False
            return super().step(closure, **options)  # type: ignore[misc]
        if closure is not None:
            if not callable(closure):
                raise InvalidArgument(f"step({told(closure)}): expected a function, or None")
            found = super().step(self._around(closure), **options)  # type: ignore[misc]
        else:
            if not averages.done:
                self.synchronize()
            before = clock.switch(clock.UPDATE)
            try:
                found = super().step(**options)  # type: ignore[misc]
            finally:
                clock.switch(before)
        averages.done = False
        return found

    step.hooked = True  # type: ignore[attr-defined]  # hooks are called in torch's own

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        """Forget the gradients. Where some are on their way, it warns, and waits for them."""
        if self._averages.begun:
            warnings.warn(
                "zero_grad() after backward(), but before step() or synchronize(): gradients were "
                "on their way to the other ranks",
                stacklevel=2,
            )
            self.synchronize()
        self._averages.done = False
        super().zero_grad(*arguments, **options)  # type: ignore[misc]

    def add_param_group(self, group: Any) -> None:
        """Add a group, whose gradients are averaged too; its names come from its place."""
        super().add_param_group(group)  # type: ignore[misc]
        if "_averages" in self.__dict__:
            self._averages.watch(self.__dict__["param_groups"])

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Average after so many backward passes from now on. Not collective; alike on all ranks."""
        self._averages.passes = whole("backward passes per step", passes, 1)
        self._averages.count_anew()

    def forget(self) -> None:
        """Wait for nothing any more that is on its way, after an error. Not collective."""
        self._averages.forget()

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def averaged() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.synchronize()
            self._averages.done = False
            return self._averages.mean(loss)

        return averaged


def _names(
    optimizer: Any,
    named_parameters: Iterable[tuple[str, Tensor]] | None,
    process_set: ProcessSet,
) -> tuple[str, dict[int, str]]:
    """Return what names by place begin with, and each parameter's name, by its id.

    Optimizers that would share names are numbered: several may have gradients on their way at
    once. Others are not: a rank may have one more of them. Raises InvalidArgument.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return _free("gradients", [], process_set), {}
    try:
        named = list(named_parameters)
    except WRONG:
        named = [named_parameters]  # type: ignore[list-item]
    if not all(isinstance(item, tuple) and len(item) == 2 for item in named):
        raise InvalidArgument(
            "named_parameters: expected pairs, as model.named_parameters() gives them"
        )
    each_once("named_parameters", [name for name, _ in named])
    given = {id(p): name for name, p in named}
    missing = [tuple(p.shape) for p in params if id(p) not in given]
    if missing:
        raise InvalidArgument(
            "named_parameters: expected all parameters of the optimizer, but those of shapes "
            f"{missing} are not among them"
        )
    own = [given[id(p)] for p in params]
    prefix = _free("gradient", own, process_set)
    places = f"{prefix}.{own[0]}" if own else prefix
    return places, {p: f"{prefix}.{name}" for p, name in given.items()}


def _free(base: str, names: list[str], process_set: ProcessSet) -> str:
    """Return `base`, with a number if an optimizer that lives has one of the names under it."""

    def taken(prefix: str) -> bool:
        wanted = {f"{prefix}.{name}" for name in names} or {prefix}
        same_set = (a for a in _live if a.process_set is process_set)
        return any(not wanted.isdisjoint(a.taken) for a in same_set)

    if taken(base):
        gc.collect()  # what is dead must be so on all ranks, also if it was part of a cycle
    return next(p for p in (f"{base}{n or ''}" for n in itertools.count()) if not taken(p))


def _groups(optimizer: Any, groups: int | Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the parameters of each group that is asked for. Raises InvalidArgument."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if isinstance(groups, (int, Integral)):
        groups = whole("groups", groups)
        bounds = [len(params) * i // groups for i in range(groups + 1)] if groups else []
        return [params[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    known = isinstance(groups, (list, tuple))
    if not known or not all(isinstance(group, (list, tuple)) for group in groups):
        raise InvalidArgument("groups: expected a number, or lists of parameters")
    here = {id(p) for p in params}
    chosen = [[p for p in group if id(p) in here] for group in groups]
    ids = [id(p) for group in chosen for p in group]
    if len({*ids}) < len(ids):
        raise InvalidArgument("groups: expected each parameter in one group at most")
    return [group for group in chosen if group]
