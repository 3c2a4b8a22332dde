"""How many samples a model was called with since the last step."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

from mpidl.autograd import recording
from mpidl.errors import InvalidArgument, MissingBackward
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.nn import Module


class RowCount:
    """Counts the rows of the first array passed by position, in training mode, while recording.

    `rows` is their sum since `forget`; None where the model was not called, NaN where it was called
    with what has no rows to count.
    """

    def __init__(self, model: Module) -> None:
        self.rows: float | None = None
        count = weakref.WeakMethod(self._count)  # or the model would keep this for ever

        def counted(*call: Any) -> None:
            counts = count()
            if counts is not None:
                counts(*call)

        self.close = model.on_output(counted)  #: ends the counting
        weakref.finalize(self, self.close).atexit = False

    def forget(self) -> None:
        """Start anew."""
        self.rows = None

    @refuses
    def weight(self, asked: float | None, step: str, *, gradients: bool) -> float:
        """Return `asked`, or where that is None what was counted.

        Raises MissingBackward where there are samples and no `gradients`, and InvalidArgument where
        nothing could be counted, or for a weight below 0 or not finite.
        """
        weight = self.rows if asked is None else asked
        if weight != 0 and not gradients:
            raise MissingBackward(
                f"{step}: no gradient: call backward() on a loss of the model's output before "
                "step(), or pass step(weight=0) where this rank has no samples"
            )
        if weight is None or (asked is None and math.isnan(weight)):
            why = "was not called" if weight is None else "was called without an array by position"
            raise InvalidArgument(
                f"{step}: the samples behind the gradient could not be counted, for the model "
                f"{why}: pass step(weight=samples)"
            )
        if not 0 <= weight < math.inf:
            raise InvalidArgument(f"{step}: weight={weight}: expected a finite number, 0 or more")
        return float(weight)

    def _count(self, model: Module, inputs: tuple[Any, ...], _: Any) -> None:
        if model.training and recording():
            shapes = (getattr(x, "shape", ()) for x in inputs)
            rows = next((shape[0] for shape in shapes if shape), math.nan)
            self.rows = (self.rows or 0) + rows
