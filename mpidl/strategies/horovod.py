"""Horovod's allreduce, where it is installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpidl import clock
from mpidl.errors import InvalidArgument, MpidlError, MPINotFound
from mpidl.strategies.base import around, in_turn, private, publish_in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.world import World

HOW_TO_GET_IT = (
    "expected one for PyTorch and for the MPI of mpi4py: "
    "HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 pip install horovod"
)

_numbers = count()  # the same on every rank: to make a strategy is collective
_users = 0  # of the Horovod that this module has started


@final
class Horovod:
    """Every rank owns everything; Horovod's allreduce moves it (Sergeev and Del Balso 2018).

    That is `horovod.torch.allreduce_` on PyTorch tensors which share the gradients' host memory.
    Horovod's thread, which wakes up every millisecond, runs from the first of these strategies to
    the `close` of the last; where the program started Horovod before, that is left to it.

    To make one is collective. Raises on every rank MPINotFound where any lacks horovod, or has one
    that was built without MPI or for another; InvalidArgument where it sees other ranks than
    `world`.
    """

    shared: ClassVar[bool] = False

    def __init__(self, world: World) -> None:
        self._hvd, self._started = _start(world)
        self._torch: Any = importlib.import_module("torch")
        self._number = next(_numbers)

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,). Raises InvalidArgument on a GPU."""
        if xp is not np:
            raise InvalidArgument(
                'strategy "horovod" averages in host memory, and the model is on the GPU: '
                'expected strategy "allreduce"'
            )
        return private(size, dtype, xp)

    def owned(self, size: int) -> slice:
        """Return all of it."""
        return slice(0, size)

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Sum the weighted `grad` (n,) in place. Collective."""
        grad *= weight
        clock.moved_bytes += around(grad.nbytes, self._hvd.size())
        # A name that comes again takes one bit to negotiate.
        name = f"mpidl.{self._number}.{grad.dtype}.{grad.size}"
        self._hvd.allreduce_(self._torch.from_numpy(grad), op=self._hvd.Sum, name=name)
        yield slice(0, grad.size), grad

    def stream(self, grads: Sequence[Array], weight: float) -> Stream:
        """Reduce one array after the other. Collective."""
        return in_turn(self, grads, weight)

    def keep(self, grad: Array, part: slice, mean: Array) -> None:
        """Nothing to write: the means are in place."""

    def complete(self, grad: Array) -> None:
        """Nothing to send: every rank has all of it."""

    def share(self, param: Array) -> None:
        """Nothing to send: every rank made the same update."""

    def publish(self, params: Sequence[Array]) -> Iterator[int]:
        """Share one array after the other. Collective."""
        return publish_in_turn(self, params)

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Nothing to add: every rank owns everything."""
        return np.array(values, np.float64)

    def close(self) -> None:
        """Stop Horovod, where this was the last to use it."""
        global _users
        if self._started:
            self._started = False
            _users -= 1
            if _users == 0:
                self._hvd.shutdown()


def _start(world: World) -> tuple[Any, bool]:
    """Return horovod.torch, at work, and whether this module started it. Collective.

    Raises as `Horovod` does.
    """
    global _users
    reason, ranks = missing(), world.MPI.COMM_WORLD.size
    problem: MpidlError | None = None
    if reason is not None:
        problem = MPINotFound(f'strategy "horovod": {reason}; {HOW_TO_GET_IT}')
    elif world.size != ranks:  # those left out would not start it
        problem = InvalidArgument(
            f'strategy "horovod": expected a world of all {ranks} ranks, not of {world.size}'
        )
    world.agree(problem)
    hvd: Any = importlib.import_module("horovod.torch")
    started = _users > 0 or not hvd.is_initialized()
    hvd.init()  # does nothing where it is at work
    reason = differs(hvd, world)
    try:
        world.agree(reason and InvalidArgument(f'strategy "horovod": {reason}'))
    except MpidlError:
        if started and _users == 0:
            hvd.shutdown()
        raise
    _users += started
    return hvd, started


def missing() -> str | None:
    """Return why `horovod.torch` cannot be started in this process, if so. Not collective."""
    if find_spec("horovod") is None:
        return "horovod is not installed"
    try:
        hvd: Any = importlib.import_module("horovod.torch")
    except (ImportError, OSError) as error:
        return f"horovod.torch: {error}"
    if not hvd.mpi_built():
        return "horovod was built without MPI"
    libraries = _mpi_libraries()
    if len(libraries) > 1:  # to start both would end the process
        return f"horovod was built for another MPI: {' and '.join(libraries)} are loaded"
    return None


def differs(hvd: Any, world: World) -> str | None:
    """Return in what the ranks of `hvd`, at work, are others than those of `world`, if so."""
    if hvd.size() != world.size:
        return f"horovod sees {hvd.size()} ranks of {world.size}"
    if hvd.rank() != world.rank:
        return f"horovod has number {hvd.rank()} for rank {world.rank}"
    return None


def _mpi_libraries() -> list[str]:
    """Return the MPI libraries that this process has loaded: two may have the same name."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(file for file in files if Path(file).name.startswith("libmpi.so"))
