"""`DataParallel`: a model whose gradients are averaged over ranks before each update."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import bucket, strategies
from mpidl.accumulation import Accumulation
from mpidl.array import Array, is_device, namespace, to_numpy
from mpidl.autograd import recording
from mpidl.errors import InvalidArgument, MissingBackward, MpidlError, NonFiniteGradient
from mpidl.optim.clip import Clip
from mpidl.optim.groups import assign, describe
from mpidl.staging import Staging
from mpidl.update import Update
from mpidl.world import World, current

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpidl.nn import Module
    from mpidl.optim.groups import Groups
    from mpidl.strategies import Strategy

BUCKET_BYTES = 32 << 20


class DataParallel:
    """Keeps `model` the same on all ranks: `step` averages the gradients and updates. Collective.

    All ranks start from rank 0's weights and buffers. Parameters and gradients move into buckets
    that the strategy allocates, and every parameter becomes a view into one. Parameters that are
    frozen (`requires_grad` is False) stay where they are: they have no optimizer, and neither
    gradients nor updates; freeze before, for `step` raises where that changed since.

    Raises on every rank: UnknownStrategy; UnsupportedDtype; RankMismatch where the parameters
    differ between ranks in name, shape, dtype or in what is frozen, or the arguments do;
    InvalidArgument for a model without parameters to train, and for values that cannot be.

    Args:
        model: any `nn.Module`, already on the device it is to train on.
        optimizer: told of flat slices only; see `optim.Optimizer`. Or name pattern -> optimizer,
            `{"*.bias": SGD(0.1), "*": AdamW()}`: the first pattern (of `fnmatch`) that matches a
            parameter's dotted name counts, and each must get one. Frozen ones need none, but a
            pattern may be theirs alone.
        strategy: a name in `strategies.STRATEGIES`, a strategy, or "auto": `choice` then tells
            which, and why.
        world: by default `mpidl.init()`.
        check_finite: look at every gradient before it is averaged, and raise NonFiniteGradient
            instead of spoiling the model. Costs one pass over the gradients.
        clip_value: bring every element of the averaged gradient into [-clip_value, clip_value].
        clip_norm: then shorten it to this Euclidean norm, over all parameters, if it is longer.
            No bucket is updated before all are averaged. See `step`.
        accumulate: this many calls of `step` make one update. See `step` and `flush`.
        bucket_bytes: about how large a bucket is.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Groups,
        strategy: str | Strategy = "auto",
        *,
        world: World | None = None,
        check_finite: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.world = world or current()
        self.model, self.optimizer, self.check_finite = model, optimizer, check_finite
        every = model.named_parameters()
        self.parameters = {name: p for name, p in every.items() if p.requires_grad}  #: to train
        self._frozen = {name: p for name, p in every.items() if not p.requires_grad}
        self.accumulate = accumulate
        self.steps = 0  #: updates made
        self._check_parameters()
        with self.world.together():
            clip = Clip(clip_value, clip_norm)
            if accumulate != int(accumulate) or accumulate < 1:
                raise InvalidArgument(f"accumulate={accumulate}: expected a whole number from 1 on")
            optimizers, group_of = assign(optimizer, self.parameters, spare=self._frozen)
        for option in (
            f"bucket_bytes={bucket_bytes}",
            f"clip_norm={clip_norm}, clip_value={clip_value}, accumulate={accumulate}",
            f"optimizer={describe(optimizer)}",
        ):
            self.world.same(option, "DataParallel")
        arrays = {name: p.data for name, p in self.parameters.items()}
        self.choice = strategies.make(
            strategy,
            self.world,
            sum(data.nbytes for data in arrays.values()),
            on_device=any(map(is_device, arrays.values())),
        )
        self.strategy = self.choice.strategy
        self.buckets = bucket.allocate(arrays, self.strategy, bucket_bytes, group_of)
        self._accumulation = Accumulation(self.buckets) if accumulate > 1 else None
        self._places: dict[str, tuple[Array, Array]] = {}
        self._broadcast()
        self._update = Update(self.world, self.strategy, self.buckets, optimizers, clip)
        self.states = self._update.states  #: the optimizer's, of each bucket's owned part
        # since the last step; None: the model was not called, NaN: with what has no rows to count
        self._samples: float | None = None
        count = weakref.WeakMethod(self._count)  # or the model would keep its buckets for ever

        def counted(*call: Any) -> None:
            counts = count()
            if counts is not None:
                counts(*call)

        self._stop_counting = model.on_output(counted)
        weakref.finalize(self, self._stop_counting).atexit = False

    def step(self, weight: float | None = None) -> None:
        """Average the gradients over ranks, update, and forget the gradients. Collective.

        `weight` is the number of samples behind this rank's gradient (a mean over them); 0 where
        a rank had none. By default the rows of the first array passed by position, summed over the
        calls of the model in training mode since the last step. A call counts also where backward
        never follows: then pass `weight`, or put the call under `no_grad`.

        With `accumulate` = k only every k-th call communicates and updates, with the exact mean
        over the samples of all k calls and all ranks. `flush` ends a shorter group.

        Raises on every rank, before anything is updated: MissingBackward where a rank has samples
        and no gradient, NonFiniteGradient if asked to look, or if `clip_norm` finds a norm that is
        not finite, InvalidArgument for samples that could not be counted, and for a parameter that
        was frozen, or whose memory was replaced. With `accumulate` this is at the k-th call, whose
        group is then forgotten.
        """
        problem: MpidlError | None = None
        try:
            weight = self._weigh(weight)
        except MpidlError as error:
            problem, weight = error, 0.0
        if self._accumulation is None:
            self._apply(weight, problem)
            return
        self._accumulation.add(weight, problem)
        self.zero_grad()
        if self._accumulation.passes == self.accumulate:
            self.flush()

    def flush(self) -> None:
        """Update with what fewer than `accumulate` calls of `step` have gathered. Collective.

        For the end of an epoch or of the data, where it makes the last group a shorter one: its
        gradient is the mean over its own samples. Does nothing where there is no such group.
        """
        if self._accumulation is not None and self._accumulation.passes:
            weight, problem = self._accumulation.mean()
            self._apply(weight, problem or self._misplaced())

    def _apply(self, weight: float, problem: MpidlError | None) -> None:
        """Average what the buckets hold, and update; or raise on every rank. Collective."""
        total, problems = map(float, self.world.sum([weight, problem is not None]))
        if problems:
            self.world.agree(problem)
        if total == 0:
            self.world.agree(MissingBackward(f"step {self.steps}: no rank has a sample"))
        try:
            self._update.make(weight / total, self.steps)
        finally:
            self.zero_grad()  # they are no longer this rank's own
        self.steps += 1

    def zero_grad(self) -> None:
        """Forget the gradients, and the samples counted, since the last step. Not collective.

        For a pass through this model that was not for its own loss. What `step` has gathered with
        `accumulate`, problems included, stays.
        """
        for parameter in self.parameters.values():
            parameter.zero_grad()
        self._samples = None

    def average_buffers(self) -> None:
        """Make each buffer of floats, such as a running mean, its mean over ranks. Collective.

        For models whose layers keep statistics of each rank's own samples: before evaluation, say.
        Buffers that are equal on all ranks keep their bits.
        """
        buffers = [b for b in self.model.buffers() if b.dtype.kind == "f"]
        if not buffers or self.world.size == 1:
            return
        flat = np.concatenate([to_numpy(b.data).reshape(-1).astype(np.float64) for b in buffers])
        means = self.world.sum(flat) / self.world.size
        for buffer in buffers:
            mine, means = means[: buffer.size], means[buffer.size :]
            value = mine.reshape(buffer.shape).astype(buffer.dtype)
            buffer.data[...] = namespace(buffer.data).asarray(value)

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Copy `state` into the model, as `Module.load_state_dict` does. Collective.

        Every rank passes the same. With "hierarchical" this is how to change parameters: the ranks
        of a node share them, and on the CPU they are read-only for all but the strategy.
        """
        self.world.barrier()  # nobody reads the old values any more
        with self.world.together():
            self._lock(False)
            try:
                self.model.load_state_dict(state, strict)
            finally:
                self._lock(self.strategy.shared)

    def close(self) -> None:
        """Give back what the strategy took. Not collective.

        The model stays usable: its parameters move to memory that is this rank's alone.
        """
        self._stop_counting()
        for parameter in self.parameters.values():
            parameter.drop_grad()
            parameter.data = parameter.data.copy()
        self.strategy.close()
        self.buckets.clear()
        self.states.clear()
        self._places.clear()
        self._accumulation = None

    def _lock(self, locked: bool) -> None:
        """Let nobody, or anybody, write to the parameters."""
        for parameter in self.parameters.values():
            if not is_device(parameter.data):
                parameter.data.flags.writeable = not locked

    def _count(self, model: Module, inputs: tuple[Any, ...], _: Any) -> None:
        if model.training and recording():
            shapes = (getattr(x, "shape", ()) for x in inputs)
            rows = next((shape[0] for shape in shapes if shape), math.nan)
            self._samples = (self._samples or 0) + rows

    def _misplaced(self) -> InvalidArgument | None:
        """Return what is wrong with a parameter that does not train as it did at the start."""
        if not self._places:
            return InvalidArgument(f"step {self.steps}: this DataParallel was closed")
        step = f"step {self.steps}: parameter"
        for name, p in self.parameters.items():
            if not p.requires_grad:
                return InvalidArgument(
                    f"{step} {name} was frozen after DataParallel was made, and its optimizer "
                    "could still move it: set its requires_grad to True before step(), or make "
                    "another DataParallel"
                )
            if p.data is not self._places[name][0]:
                return _left(f"{step} {name}")
        for name, p in self._frozen.items():
            if p.requires_grad:
                return InvalidArgument(
                    f"{step} {name} was frozen when DataParallel was made, and has no optimizer: "
                    "set its requires_grad to False, or make another DataParallel"
                )
        return None

    def _weigh(self, weight: float | None) -> float:
        """Return this rank's weight, its gradients being in order and complete; or raise."""
        step = f"step {self.steps}"
        problem = self._misplaced()
        if problem is not None:
            raise problem
        counted = weight is None
        if weight is None:
            weight = self._samples
        if weight != 0 and all(p.grad is None for p in self.parameters.values()):
            raise MissingBackward(
                f"{step}: no gradient: call backward() on a loss of the model's output before "
                "step(), or pass step(weight=0) where this rank has no samples"
            )
        if weight is None or (counted and math.isnan(weight)):
            why = "was not called" if weight is None else "was called without an array by position"
            raise InvalidArgument(
                f"{step}: the samples behind the gradient could not be counted, for the model "
                f"{why}: pass step(weight=samples)"
            )
        if not 0 <= weight < float("inf"):
            raise InvalidArgument(f"{step}: weight={weight}: expected a finite number, 0 or more")
        for name, p in self.parameters.items():
            if not weight or p.grad is None:  # has no part in this step's loss
                p.fill_grad()
            elif self.check_finite and not namespace(p.grad).isfinite(p.grad).all():
                raise NonFiniteGradient(f"{step}: the gradient of {name} is not finite")
            if p.grad is not self._places[name][1]:
                raise _left(f"{step}: parameter {name}")
        return float(weight)

    def _check_parameters(self) -> None:
        """Compare parameters and buffers with rank 0's, all but their values. Collective."""
        mine = [
            f"{'frozen ' * (name in self._frozen)}parameter {name} of shape {p.shape}, {p.dtype}, "
            + ("on the GPU" if is_device(p.data) else "on the CPU")
            for name, p in self.model.named_parameters().items()
        ]
        mine += [
            f"buffer {name} of shape {b.shape}, {b.dtype}"
            for name, b in self.model.named_buffers().items()
        ]
        with self.world.together():
            if not self.parameters:
                frozen = " to train: all are frozen" if self._frozen else ""
                raise InvalidArgument(f"{type(self.model).__name__} has no parameters{frozen}")
            for name, p in self.parameters.items():
                bucket.check_dtype(p.data, f"parameter {name}")
        first = self.world.broadcast(mine)
        pairs = zip(mine + ["no more"] * len(first), first + ["no more"] * len(mine), strict=False)
        self.world.agree(next((f"{a}, where rank 0 has {b}" for a, b in pairs if a != b), None))

    def _broadcast(self) -> None:
        """Move the parameters into the buckets, and take rank 0's values. Collective.

        As after an update: the owners write, into memory that may be shared, and publish.
        """
        staging, root = Staging(), self.world.rank == 0
        for flat in self.buckets:
            values = namespace(flat.param).zeros_like(flat.param)
            for name, part in flat.slices().items():
                values[part] = self.parameters[name].data.reshape(-1)
            for part in staging.chunks(values):
                with staging.host(values[part], read=root, write=not root) as buffer:
                    self.world.comm.Bcast(buffer)
            owned = self.strategy.owned(flat.param.size)
            flat.param[owned] = values[owned]
            self.strategy.share(flat.param)
            for name, param, grad in flat.views():
                self.parameters[name].bind(param, grad)
                self._places[name] = param, grad
        staging.close()
        self._lock(self.strategy.shared)
        buffers = self.model.buffers()
        values = self.world.broadcast([to_numpy(b.data) for b in buffers])
        for kept, value in zip(buffers, values, strict=True):
            kept.data[...] = namespace(kept.data).asarray(value)
        for frozen in self._frozen.values():  # one by one: most of a large model may be frozen
            value = self.world.broadcast(to_numpy(frozen.data))
            frozen.data[...] = namespace(frozen.data).asarray(value)


def _left(what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{what} has left its bucket: set values with DataParallel.load_state_dict, and give a "
        "model to one DataParallel only"
    )
