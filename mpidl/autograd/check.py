"""The numeric checker: every gradient against central differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpidl.array import namespace, to_numpy
from mpidl.autograd.tensor import Tensor
from mpidl.errors import GradientMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array


def check_gradients(
    function: Callable[..., Tensor], *arrays: Array, step: float = 1e-6, tolerance: float = 1e-6
) -> None:
    """Compare the gradients of `function(*tensors)` with central differences, in float64.

    `function` may return any shape: a fixed random weighting makes it one number. The error of
    an element is taken relative to max(1, |numeric|). Raises GradientMismatch, which names the
    worst element, where it passes `tolerance`.
    """
    inputs = [Tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    outcome = function(*inputs)
    weights = np.random.default_rng(0).standard_normal(outcome.shape)
    weights = namespace(outcome.data).asarray(weights)
    outcome.backward(weights)

    def value() -> float:
        return float((function(*inputs).data * weights).sum())

    for number, x in enumerate(inputs):
        found = np.zeros(x.shape) if x.grad is None else to_numpy(x.grad)
        numeric = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            original = float(x.data[index])
            x.data[index] = original + step
            above = value()
            x.data[index] = original - step
            numeric[index] = (above - value()) / (2 * step)
            x.data[index] = original
        error = np.abs(found - numeric) / np.maximum(1, np.abs(numeric))
        if error.size and not error.max() <= tolerance:  # NaN is an error too
            worst = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), x.shape)
            raise GradientMismatch(
                f"argument {number}, element {tuple(map(int, worst))}: gradient {found[worst]:.8g},"
                f" numeric {numeric[worst]:.8g} (error {error[worst]:.2g} > {tolerance:g})"
            )
