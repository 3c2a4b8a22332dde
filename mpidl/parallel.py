"""`DataParallel`: a model whose gradients are averaged over ranks before each update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl import bucket, strategies
from mpidl.array import Array, is_device, namespace
from mpidl.autograd import recording
from mpidl.errors import InvalidArgument, MissingBackward, MpidlError, NonFiniteGradient
from mpidl.staging import Staging
from mpidl.world import World, current

if TYPE_CHECKING:
    from mpidl.nn import Module
    from mpidl.optim import Optimizer
    from mpidl.strategies import Strategy

BUCKET_BYTES = 32 << 20


class DataParallel:
    """Keeps `model` the same on all ranks: `step` averages the gradients and updates. Collective.

    All ranks start from rank 0's weights. Parameters and gradients move into buckets that the
    strategy allocates, and every parameter becomes a view into one.

    Raises on every rank: UnknownStrategy; UnsupportedDtype; RankMismatch where the parameters
    differ between ranks in name, shape or dtype; InvalidArgument for a model without parameters.

    Args:
        model: any `nn.Module`, already on the device it is to train on.
        optimizer: told of flat slices only; see `optim.Optimizer`.
        strategy: a name in `strategies.STRATEGIES`, or a strategy.
        world: by default `mpidl.init()`.
        check_finite: look at every gradient before it is averaged, and raise NonFiniteGradient
            instead of spoiling the model. Costs one pass over the gradients.
        bucket_bytes: about how large a bucket is.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        strategy: str | Strategy = "allreduce",
        *,
        world: World | None = None,
        check_finite: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.world = world or current()
        self.model, self.optimizer, self.check_finite = model, optimizer, check_finite
        self.parameters = model.named_parameters()
        self.steps = 0
        self._check_parameters()
        self.world.same(f"bucket_bytes={bucket_bytes}", "DataParallel")
        self.strategy = strategies.make(strategy, self.world)
        arrays = {name: p.data for name, p in self.parameters.items()}
        self.buckets = bucket.allocate(arrays, self.strategy, bucket_bytes)
        self.states: list[dict[str, Array]] = []  # of the owned parts; known at the first step
        self._places: dict[str, Array] = {}
        self._broadcast()
        self._samples: int | None = None  # None: the model was not called since the last step
        self._stop_counting = model.on_forward(self._count)

    def step(self, weight: float | None = None) -> None:
        """Average the gradients over ranks, update, and forget the gradients. Collective.

        `weight` is the number of samples behind this rank's gradient (a mean over them); 0 where
        a rank had none. By default the rows of the inputs with which the model was called, in
        training mode, since the last step.

        Raises on every rank, before anything is updated: MissingBackward where a rank has samples
        and no gradient, NonFiniteGradient if asked to look.
        """
        problem: MpidlError | None = None
        try:
            weight = self._weigh(weight)
        except MpidlError as error:
            problem, weight = error, 0.0
        total, problems = map(float, self.world.sum([weight, problem is not None]))
        if problems:
            self.world.agree(problem)
        if total == 0:
            self.world.agree(MissingBackward(f"step {self.steps}: no rank has a sample"))
        first = not self.states
        for i, flat in enumerate(self.buckets):
            owned = self.strategy.reduce(flat.grad, weight / total)
            param, grad = flat.param[owned], flat.grad[owned]
            if first:
                self.states.append(self.optimizer.init(param))
            self.optimizer.update(param, grad, self.states[i])
            self.strategy.share(flat.param)
        for parameter in self.parameters.values():
            parameter.zero_grad()
        self._samples = None
        self.steps += 1

    def close(self) -> None:
        """Give back what the strategy took. The model stays usable. Not collective."""
        self._stop_counting()
        self.strategy.close()

    def _count(self, model: Module, inputs: tuple[Any, ...]) -> None:
        if model.training and recording() and inputs:
            self._samples = (self._samples or 0) + len(inputs[0])

    def _weigh(self, weight: float | None) -> float:
        """Return this rank's weight, its gradients being in order and complete; or raise."""
        step = f"step {self.steps}"
        if weight is None:
            weight = self._samples
        gradients = any(p.grad is not None for p in self.parameters.values())
        if weight is None or (weight and not gradients):
            raise MissingBackward(
                f"{step}: no gradient: call backward() on a loss of the model's output before "
                "step(), and pass step(weight=samples) if the model itself was not called"
            )
        if not 0 <= weight < float("inf"):
            raise InvalidArgument(f"{step}: weight={weight}: expected a finite number, 0 or more")
        for name, p in self.parameters.items():
            if p.data is not self._places[name]:
                raise InvalidArgument(
                    f"{step}: parameter {name} has left its bucket: set values with "
                    "p.data[...] = values, and give a model to one DataParallel only"
                )
            if not weight or p.grad is None:  # has no part in this step's loss
                p.fill_grad()
            elif self.check_finite and not namespace(p.grad).isfinite(p.grad).all():
                raise NonFiniteGradient(f"{step}: the gradient of {name} is not finite")
        return weight

    def _check_parameters(self) -> None:
        """Compare names, shapes and dtypes with rank 0's. Collective."""
        mine = [
            f"parameter {name} of shape {p.shape}, {p.dtype}, on the "
            + ("GPU" if is_device(p.data) else "CPU")
            for name, p in self.parameters.items()
        ]
        with self.world.together():
            if not mine:
                raise InvalidArgument(f"{type(self.model).__name__} has no parameters")
            for name, p in self.parameters.items():
                bucket.check_dtype(p.data, f"parameter {name}")
        first = self.world.broadcast(mine)
        pairs = zip(mine + ["no more"] * len(first), first + ["no more"] * len(mine), strict=False)
        self.world.agree(next((f"{a}, where rank 0 has {b}" for a, b in pairs if a != b), None))

    def _broadcast(self) -> None:
        """Move the parameters into the buckets, and take rank 0's values. Collective."""
        staging = Staging()
        for flat in self.buckets:
            for name, param, grad in flat.views():
                self.parameters[name].bind(param, grad)
                self._places[name] = param
            root = self.world.rank == 0
            for chunk in staging.chunks(flat.param):
                with staging.host(chunk, read=root, write=not root) as buffer:
                    self.world.comm.Bcast(buffer)
        staging.close()
