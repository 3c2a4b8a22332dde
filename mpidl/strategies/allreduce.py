"""MPI_Allreduce, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl.staging import Staging
from mpidl.strategies.base import private

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mpidl.array import Array
    from mpidl.world import World


@final
class AllReduce:
    """Every rank owns everything; MPI_Allreduce moves it (MPI-4.1, section 6.9.6).

    A GPU array is handed over as it is where MPI is CUDA-aware, else through pinned memory.
    """

    def __init__(self, world: World) -> None:
        self.world, self.staging = world, Staging()

    def allocate(self, size: int, dtype: Any, xp: Any) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,)."""
        return private(size, dtype, xp)

    def reduce(self, grad: Array, weight: float) -> slice:
        """Replace `grad` (n,) by the weighted sum over ranks. Collective. Owns all of it."""
        for chunk in self.staging.chunks(grad):
            chunk *= weight
            with self.staging.host(chunk) as buffer:
                self.world.comm.Allreduce(self.world.MPI.IN_PLACE, buffer)
        return slice(0, grad.size)

    def share(self, param: Array) -> None:
        """Nothing to send: every rank made the same update."""

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Nothing to add: every rank owns everything."""
        return np.array(values, np.float64)

    def close(self) -> None:
        """Give the pinned memory back."""
        self.staging.close()
