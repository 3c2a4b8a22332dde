"""Training in float16, with master weights in float32 and a loss that is scaled."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.array import is_device, namespace
from mpidl.autograd import Tensor, apply, recording, tape
from mpidl.errors import InvalidArgument, NonFiniteGradient, UnsupportedDtype
from mpidl.optim.master import MasterWeights
from mpidl.refuse import told
from mpidl.strategies import TAKE_HALF, takes_half

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.bucket import Bucket
    from mpidl.nn import Module
    from mpidl.optim import Optimizer
    from mpidl.world import World

FIRST_SCALE = 2.0**15  # of a loss whose gradient is 1: 2**16 is more than float16 holds
MOST = 2.0**24
GROWS_AFTER = 2000  # steps without an overflow; Micikevicius et al. 2018, section 3.2
HALF = np.dtype(np.float16)
PRECISIONS = ("fp16",)


class LossScale:
    """A power of two that keeps small gradients from becoming 0 in float16.

    It doubles after `grows_after` steps without an overflow, and halves at each.
    """

    def __init__(self, scale: float = FIRST_SCALE, grows_after: int = GROWS_AFTER) -> None:
        self.scale, self.grows_after = scale, grows_after
        self.good = 0  #: steps since it changed

    def note(self, overflow: bool, step: str) -> None:
        """Change the scale after a step, which was the same on all ranks.

        Raises NonFiniteGradient where no scale helps.
        """
        if overflow:
            if self.scale <= 1:
                raise NonFiniteGradient(
                    f"{step}: a gradient is not finite at a loss scale of {self.scale:g}: the loss "
                    "or an activation is too large for float16"
                )
            self.scale, self.good = self.scale / 2, 0
            return
        self.good += 1
        if self.good == self.grows_after:
            self.scale, self.good = min(2 * self.scale, MOST), 0


class MixedPrecision:
    """Lets `model` compute in float16: parameters, and what goes into it; out comes float32.

    Gradients that come back into the output are scaled, so the loss needs nothing: as long as
    every gradient comes through the model's output. A call of a part of the model, or a loss of the
    parameters themselves, is not scaled; weight decay is the optimizer's.
    """

    def __init__(self, model: Module) -> None:
        self.loss_scale = LossScale()
        for parameter in model.named_parameters().values():
            parameter.drop_grad()
            parameter.data = parameter.data.astype(HALF)
        scale = self.loss_scale  # no reference to this object: the model keeps the hooks
        ends = (
            model.on_forward(lambda _, inputs: tuple(map(_narrowed, inputs))),
            model.on_output(lambda _, __, output: _widened(output, scale)),
        )
        tape.narrow += 1
        self.close = weakref.finalize(self, _end, model, ends)
        self.close.atexit = False

    def unscaled(self, weight: float, overflow: bool, step: str) -> float:
        """Return the weight that takes the scale out of the gradients. Changes the scale."""
        weight = weight / self.loss_scale.scale
        self.loss_scale.note(overflow, step)
        return weight

    def overflows(self, buckets: Sequence[Bucket]) -> bool:
        """Return whether a gradient of this rank is not finite. A GPU is waited for, once."""
        found = [namespace(flat.grad).isfinite(flat.grad).all() for flat in buckets]
        if not found:
            return False
        xp = namespace(buckets[0].grad)
        return not bool(xp.stack(found).all())


def _end(model: Module, ends: Sequence[Any]) -> None:
    """Let the model compute in float32 again, with the values that it has."""
    tape.narrow -= 1
    for end in ends:
        end()
    for parameter in model.named_parameters().values():
        parameter.drop_grad()
        parameter.data = parameter.data.astype(np.float32)


def _narrowed(value: Any) -> Any:
    """Return arrays and tensors of floats in float16, and everything else as it is."""
    known = isinstance(value, (Tensor, np.ndarray)) or is_device(value)
    return value.astype(HALF) if known and value.dtype.kind == "f" else value


def _widened(value: Any, scale: LossScale) -> Any:
    """Return tensors of float16 in float32, also in tuples, lists and dicts."""
    if isinstance(value, Tensor) and value.dtype.kind == "f":  # also what is wide already: scaled
        wide = np.dtype(np.float32) if value.dtype == HALF else value.dtype
        options = {"scale": lambda: scale.scale} if recording() else {}
        if not options and value.dtype == wide:
            return value
        return apply("astype", value, dtype=wide, **options)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_widened(v, scale) for v in value))
    if type(value) in (tuple, list):
        return type(value)(_widened(v, scale) for v in value)
    if type(value) is dict:
        return {name: _widened(v, scale) for name, v in value.items()}
    return value


def mixed(
    world: World,
    model: Module,
    optimizers: list[Optimizer],
    precision: Any,
    strategy: Any,
    others: dict[str, bool],
) -> tuple[MixedPrecision | None, list[Optimizer]]:
    """Let `model` compute in this precision, and optimizers keep master weights. Collective.

    `others` are options that cannot go with it, and whether each was given. None changes nothing.
    Raises on every rank InvalidArgument for another name, with one of these or with a strategy that
    does not take it, UnsupportedDtype where a parameter is not float32, and RankMismatch where
    ranks differ.
    """
    with world.together():
        if precision is not None:
            _check(precision, model, strategy, others)
    world.same(f"{precision=}", "DataParallel")
    if precision is None:
        return None, optimizers
    return MixedPrecision(model), [MasterWeights(one) for one in optimizers]


def _check(precision: Any, model: Module, strategy: Any, others: dict[str, bool]) -> None:
    if not isinstance(precision, str) or precision not in PRECISIONS:
        more = ": neither NumPy nor CuPy 13 computes in bfloat16" if precision == "bf16" else ""
        raise InvalidArgument(f"precision={told(precision)}{more}: expected None or 'fp16'")
    for name, given in others.items():
        if given:
            raise InvalidArgument(f"precision={precision!r} with {name}: expected one of them")
    if not takes_half(strategy):
        raise InvalidArgument(
            f"precision={precision!r} with strategy {told(strategy)}: expected one of "
            f"{', '.join(TAKE_HALF)}, which add up in float32"
        )
    for name, p in model.named_parameters().items():
        if p.dtype != np.float32:
            raise UnsupportedDtype(
                f"precision={precision!r}: parameter {name} has dtype {p.dtype}: expected float32"
            )


def check_scale(value: Any) -> tuple[float, int]:
    """Return scale and good steps as a checkpoint holds them. Raises ValueError."""
    scale, good = value
    power = isinstance(scale, float) and 1 <= scale <= MOST and math.frexp(scale)[0] == 0.5
    if not power or type(good) is not int or not 0 <= good < GROWS_AFTER:
        raise ValueError(f"loss scale {value!r}")
    return scale, good
