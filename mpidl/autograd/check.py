"""The numeric checker: both modes of differentiation against central differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpidl.array import as_array, is_array, namespace, to_numpy
from mpidl.autograd.modes import no_grad
from mpidl.autograd.tensor import Tensor
from mpidl.autograd.transforms import jvp, vjp
from mpidl.errors import GradientMismatch, InvalidArgument
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array


def check_gradients(
    function: Callable[..., Tensor], *arrays: Array, step: float = 1e-6, tolerance: float = 1e-6
) -> None:
    """Compare the derivatives of `function(*tensors)` with central differences, in float64.

    `function` may return any shape. Reverse mode: a fixed random weighting w makes the value one
    number, whose gradient is compared element by element. Forward mode: the change of w . value
    along each single element, for up to 8 of them. Errors are relative to max(1, |numeric|).
    Raises GradientMismatch, which names the mode and the worst element, where one passes
    `tolerance`, and InvalidArgument for what are no arrays of numbers, and no bounds above 0.
    """
    for name, bound in (("step", step), ("tolerance", tolerance)):
        if not isinstance(bound, (int, float)) or not 0 < bound < np.inf:
            found = told(bound)
            raise InvalidArgument(f"check_gradients {name}={found}: expected 0 < {name} < inf")
    for x in arrays:
        if not (is_array(x) and x.dtype.kind in "biuf"):
            raise InvalidArgument(f"check_gradients: expected arrays, found {told(x)}")
    points = [as_array(a).astype(np.float64) for a in arrays]
    value, pull = vjp(function, *points)
    xp, rng = namespace(value), np.random.default_rng(0)
    weights = xp.asarray(rng.standard_normal(value.shape))
    pulled = pull(weights)
    gradients = [to_numpy(g) for g in (pulled if isinstance(pulled, tuple) else (pulled,))]

    def weighted() -> float:
        with no_grad():
            return float((function(*map(Tensor, points)).data * weights).sum())

    for number, x in enumerate(points):
        numeric = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            original = float(x[index])
            x[index] = original + step
            above = weighted()
            x[index] = original - step
            numeric[index] = (above - weighted()) / (2 * step)
            x[index] = original
        _compare("reverse", number, gradients[number], numeric, tolerance)

        pushed = numeric.copy()
        for i in rng.permutation(x.size)[:8]:
            index = np.unravel_index(int(i), x.shape)
            directions = [xp.zeros_like(p) for p in points]
            directions[number][index] = 1
            change = jvp(function, tuple(points), tuple(directions))[1]
            if change.shape != value.shape:
                raise GradientMismatch(
                    f"forward mode, argument {number}: a change of shape {change.shape}"
                    f" of a value of shape {value.shape}"
                )
            pushed[index] = float((change * weights).sum())
        _compare("forward", number, pushed, numeric, tolerance)


def _compare(mode: str, number: int, found: Array, numeric: Array, tolerance: float) -> None:
    error = np.abs(found - numeric) / np.maximum(1, np.abs(numeric))
    if error.size and not error.max() <= tolerance:  # NaN is an error too
        worst = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
        raise GradientMismatch(
            f"{mode} mode, argument {number}, element {tuple(map(int, worst))}: gradient"
            f" {found[worst]:.8g}, numeric {numeric[worst]:.8g}"
            f" (error {error[worst]:.2g} > {tolerance:g})"
        )
