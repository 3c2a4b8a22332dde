"""The contract of a strategy. It sees flat 1-D arrays (NumPy or CuPy), and no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mpidl.array import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from mpidl.array import Array


class Strategy(Protocol):
    """One small final class; it never inherits from another strategy. Made as `Class(world)`."""

    def allocate(self, size: int, dtype: np.dtype[Any], xp: Any) -> tuple[Array, Array]:
        """Return the parameter and the gradient array (size,), zeroed. Collective.

        They lie in the memory the strategy works best in. `xp` is numpy or cupy.
        """

    def reduce(self, grad: Array, weight: float) -> slice:
        """Replace `grad` (n,) by the sum over ranks of weight x grad. Collective.

        The weights of all ranks add up to 1, so that the sum is the mean over samples. Returns
        the part this rank now owns; only there is `grad` sure to hold the mean. The owned parts
        of all ranks cover the array.
        """

    def share(self, param: Array) -> None:
        """Publish the owned parts of `param` (n,), after their owners updated them. Collective."""

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Return sums over the whole array, given `values` (k,) over this rank's part. Collective.

        For norms, say: each element counts once, however many ranks own it.
        """

    def close(self) -> None:
        """Give back what was taken. Not collective; safe after a failure."""


def private(size: int, dtype: Any, xp: Any) -> tuple[Array, Array]:
    """Return two zeroed arrays (size,) in this process's own memory."""
    return aligned_zeros(size, dtype, xp), aligned_zeros(size, dtype, xp)
