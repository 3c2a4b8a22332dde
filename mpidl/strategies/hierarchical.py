"""Gradients that are born in memory which all ranks of the node share."""

from __future__ import annotations

import mmap
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpidl import shared
from mpidl.array import ALIGNMENT_BYTES, UPDATE_BLOCK_BYTES, blocks
from mpidl.errors import InvalidArgument, NoSharedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages
    from mpidl.world import World

LINE = ALIGNMENT_BYTES // 4  # elements: a cache line of float32, two of float64
PAGE = mmap.PAGESIZE


@final
class Hierarchical:
    """Each rank owns a slice: it reads its peers' gradients where they are, and adds them up.

    The ranks of a node have one parameter array, and map each other's gradients. So nothing is
    packed, copied or sent: with P ranks, a rank reads 1/P of P gradients, and updates 1/P of the
    parameters. The optimizer's state exists once on the node.

    The protocol, for one array in one step:

    1. backward writes to this rank's gradient, and reads the parameters;
    2. `reduce` gathers the weights. Whoever has all of them knows that all peers have finished 1;
    3. it adds up the owned slice, block by block, in cache. Whoever iterates updates each block of
       the owned parameters meanwhile: the mean itself is never written to memory;
    4. `share` waits for all peers to finish 3. Then 1 may begin again.

    Each element is the sum over ranks in their order, whoever owns it: same bits in every run.
    One node only: raises NoSharedMemory where there are more.
    """

    shared: ClassVar[bool] = True

    def __init__(self, world: World) -> None:
        if world.nodes > 1:
            raise NoSharedMemory(f"ranks on {world.nodes} nodes: hierarchical is for one node")
        self.world = world
        self._weights = np.empty(world.local_size)
        self._scratch: dict[np.dtype[Any], Array] = {}  # two blocks of each dtype
        # this rank's part, and the gradients of all ranks; by id of its own
        self._known: dict[int, tuple[slice, list[Array]]] = {}

    def allocate(self, size: int, dtype: Any, xp: Any) -> tuple[Array, Array]:
        """Return the node's parameter array and this rank's gradient (size,). Collective.

        Nothing is written: NUMA nodes hold what their own ranks write first. Raises
        InvalidArgument for arrays on a GPU, and NoSharedMemory on every rank where the ranks
        cannot map each other's memory.
        """
        if xp is not np:
            raise InvalidArgument(
                'strategy "hierarchical" averages in host memory, and the model is on the GPU: '
                'use "allreduce", or "auto"'
            )
        ranks = self.world.local_size
        stride = (size * np.dtype(dtype).itemsize // PAGE + 1) * PAGE
        memory = shared.allocate(self.world, stride * (1 + ranks))
        param, grad, *grads = (
            np.ndarray(size, dtype, memory, stride * place)
            for place in (0, 1 + self.world.local_rank, *range(1, 1 + ranks))
        )
        if grad.dtype not in self._scratch:
            self._scratch[grad.dtype] = np.empty((2, UPDATE_BLOCK_BYTES // grad.itemsize), dtype)
        self._known[id(grad)] = self.owned(size), grads
        weakref.finalize(grad, self._known.pop, id(grad)).atexit = False
        return param, grad

    def owned(self, size: int) -> slice:
        """Return this rank's part: no two ranks write to one cache line."""
        rank, ranks = self.world.local_rank, self.world.local_size
        lines = -(-size // LINE)
        start, stop = (min(size, lines * r // ranks * LINE) for r in (rank, rank + 1))
        return slice(start, stop)

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Add up the owned slice of the peers' weighted gradients (n,). Collective.

        Equal weights, the usual case, are applied to the sum: one pass less.
        """
        owned, peers = self._parts(grad)
        self._weights[self.world.local_rank] = weight
        self.world.local.Allgather(self.world.MPI.IN_PLACE, self._weights)
        weights: list[float] = self._weights.tolist()
        even, scratch = min(weights) == max(weights), self._scratch[grad.dtype]
        for block in blocks(grad[owned], UPDATE_BLOCK_BYTES):
            part = slice(owned.start + block.start, owned.start + block.stop)
            total, addend = scratch[:, : part.stop - part.start]
            if even:
                so_far = peers[0][part]
                for peer in peers[1:]:
                    so_far = np.add(so_far, peer[part], out=total)
                np.multiply(so_far, weights[0], out=total)
            else:
                np.multiply(peers[0][part], weights[0], out=total)
                for peer, w in zip(peers[1:], weights[1:], strict=True):
                    total += np.multiply(peer[part], w, out=addend)
            yield part, total

    def average(self, grad: Array, weight: float) -> Array:
        """Return all of the weighted mean (n,), on every rank. Collective.

        It is the node's one copy, in place of the lowest rank's gradient, where a slice is in cache
        when it has been added up. To be read, until `share` is called, as must be done.
        """
        _, (mean, *_) = self._parts(grad)
        for part, piece in self.reduce(grad, weight):
            mean[part] = piece
        self.world.local.Barrier()
        return mean

    def share(self, param: Array) -> None:  # noqa: ARG002  # all have it
        """Wait until all peers have updated their slices, and need our gradient no more."""
        self.world.local.Barrier()

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Add up what the ranks own. Collective."""
        return self.world.sum(values)

    def close(self) -> None:
        """Nothing: the memory goes when the arrays in it go."""

    def _parts(self, grad: Array) -> tuple[slice, list[Array]]:
        """Return this rank's part, and the gradients of all ranks, given its own."""
        if id(grad) not in self._known:
            raise InvalidArgument("hierarchical: expected a gradient that it allocated")
        return self._known[id(grad)]
