"""Gradients that are born in memory which all ranks of the node share."""

from __future__ import annotations

import copy
import mmap
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpidl import codecs, exchange, shared
from mpidl.array import ALIGNMENT_BYTES, GRAIN, UPDATE_BLOCK_BYTES, blocks
from mpidl.codecs import PowerSGD
from mpidl.errors import InvalidArgument
from mpidl.exchange import Exchange, Lane, Source
from mpidl.lowrank import LowRank, Matrix
from mpidl.strategies.base import private
from mpidl.tree import Tree, add, depth

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.tree import Sum
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

    Between nodes, each rank exchanges its slice with those that own it there, all ranks of a node
    at once: see `Exchange`. The sum on the node goes on while blocks are on their way. `codec`
    makes them shorter; it is not used between ranks of a node, where nothing travels.

    Each element is the sum over ranks in their order, node by node, whoever owns it: same bits in
    every run. With `microbatches` = V the ranks leave sums over subtrees of V microbatches in their
    `partials`, which are added up by the rest of the `Tree`: same bits on any number of ranks. Not
    with a codec.

    Raises InvalidArgument for both.
    """

    shared: ClassVar[bool] = True

    def __init__(
        self, world: World, codec: codecs.Spec = None, microbatches: int | None = None
    ) -> None:
        self.world, self.codec, self.microbatches = world, codecs.make(codec), microbatches
        if microbatches is not None and self.codec is not None:
            raise InvalidArgument(
                f"{microbatches=} with codec {self.codec}: what codecs leave out depends on the "
                "number of ranks: take one of them"
            )
        self.tree = None if microbatches is None else Tree.of(microbatches, world)
        self.exchange = (
            LowRank(world, self.codec)
            if isinstance(self.codec, PowerSGD)
            else Exchange(world, self.codec, self.tree)
        )
        self._weights = np.empty(world.local_size)
        self._scratch: dict[np.dtype[Any], Array] = {}  # two blocks of each dtype
        self._known: dict[int, _Known] = {}  # by id of the gradient

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
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
        counts, sums = self._arrays()
        before = sum(counts[: self.world.local_rank])
        mine = slice(before, before + counts[self.world.local_rank])
        if 1 < self.world.nodes == self.world.size:  # nobody to share with
            param, grad = private(size, dtype, xp)
            # grad[:]: no reference to itself
            grads = [*(np.empty_like(grad) for _ in range(mine.stop - 1)), grad[:]]
        else:
            stride = (size * np.dtype(dtype).itemsize // PAGE + 1) * PAGE
            memory = shared.allocate(self.world, stride * (1 + sum(counts)))
            param, grad, *grads = (
                np.ndarray(size, dtype, memory, stride * place)
                for place in (0, mine.stop, *range(1, 1 + sum(counts)))
            )
        if grad.dtype not in self._scratch:
            rows = max([2, *map(depth, sums)])
            self._scratch[grad.dtype] = np.empty((rows, UPDATE_BLOCK_BYTES // grad.itemsize), dtype)
        owned, lanes, state, homes = self.owned(size), [], {}, []
        if self.world.nodes > 1:
            lanes = list(exchange.lanes(size, self.world, self._part))
            state = self.exchange.state(owned, lanes, grad.dtype, layout)
            homes = [np.empty_like(grad) for _ in sums[1:]]
        known = _Known(owned, grads, grads[mine], sums, homes, lanes, state, layout)
        self._known[id(grad)] = known
        weakref.finalize(grad, self._known.pop, id(grad)).atexit = False
        return param, grad

    def on_node(self) -> Hierarchical:
        """Return the same on this node alone, for the same arrays. Not collective."""
        twin = copy.copy(self)
        twin.world = self.world.on_node()
        return twin

    def owned(self, size: int) -> slice:
        """Return this rank's part: no two ranks of a node write to one cache line."""
        return self._part(size, self.world.local_rank, self.world.local_size)

    def partials(self, grad: Array) -> list[Array]:
        """Return the arrays (n,) for this rank's sums over subtrees of microbatches, in order.

        `grad` (n,) is the last. Not collective.
        """
        return [*self._find(grad).mine[:-1], grad]

    def state(self, grad: Array) -> dict[str, Array]:
        """Return what the codec keeps from step to step for the owned part of `grad` (n,)."""
        return self._find(grad).state

    def matrices(self, grad: Array) -> Iterator[tuple[Matrix, int]]:
        """Yield each matrix of which `state` has directions, in their order, and their number."""
        known = self._find(grad)
        if isinstance(self.exchange, LowRank):
            for m in self.exchange.matrices(known.lanes, known.layout):
                yield m, self.exchange.rank

    def codecs(self) -> list[codecs.Codec]:
        """Return those that may draw random numbers."""
        return self.exchange.codecs if isinstance(self.exchange, Exchange) else []

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Add up the owned slice of all ranks' weighted gradients (n,). Collective."""
        return ((part, mean) for _, part, mean in self.stream([grad], weight))

    def stream(self, grads: Sequence[Array], weight: float) -> Stream:
        """Reduce several, with messages of all of them on their way at once. Collective."""
        # All are ready: so once for all, and not later, when peers may wait for our messages.
        self._weights[self.world.local_rank] = weight
        self.world.gather_on_node(self._weights)
        weights: list[float] = self._weights.tolist()
        sources = []
        for grad in grads:
            known = self._find(grad)
            sums = self._sums(known, grad.dtype, weights)
            if self.tree is not None:
                sums = self._subtree_sums(known, grad.dtype, weight)
            sources.append(
                Source(
                    grad,
                    known.owned,
                    sums,
                    known.lanes,
                    known.state,
                    known.layout,
                    known.homes,
                    weight,
                )
            )
        if self.world.nodes > 1:
            yield from self.exchange.average(sources)
            return
        for number, source in enumerate(sources):
            for part, mean in source.sums:
                yield number, part, mean

    def _sums(self, known: _Known, dtype: Any, weights: list[float]) -> Averages:
        """Add up the owned slice of the weighted gradients on this node.

        Equal weights, the usual case, are applied to the sum: one pass less.
        """
        owned, peers = known.owned, known.grads
        even, scratch = min(weights) == max(weights), self._scratch[dtype]
        for block in blocks(peers[0][owned], UPDATE_BLOCK_BYTES):
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

    def _subtree_sums(self, known: _Known, dtype: Any, weight: float) -> Averages:
        """Add up what the ranks of this node hold, in the order of the tree.

        On one node `weight`, which is the same on all ranks, is applied to the sum. Between nodes
        there may be several sums: the last is yielded, the others are left in their homes.
        """
        scratch, homes = self._scratch[dtype], known.homes
        for block in blocks(known.grads[0][known.owned], UPDATE_BLOCK_BYTES):
            part = slice(known.owned.start + block.start, known.owned.start + block.stop)
            rows = scratch[:, : part.stop - part.start]
            arrays, total = [array[part] for array in known.grads], rows[0]
            for number, plan in enumerate(known.sums):
                total = add(plan, arrays, rows)
                if number < len(homes):
                    homes[number][part] = total
            yield part, total if self.world.nodes > 1 else np.multiply(total, weight, out=rows[0])

    def keep(self, grad: Array, part: slice, mean: Array) -> None:
        """Write it into the gradients of all ranks of the node, while it is in cache.

        Nobody else reads this part of them, or writes to it, before `complete`.
        """
        for peer in self._find(grad).grads:
            peer[part] = mean

    def complete(self, grad: Array) -> None:
        """Wait until all ranks of the node have kept what they own. Collective."""
        self.world.local.Barrier()

    def average(self, grad: Array, weight: float) -> Array:
        """Return all of the weighted mean (n,), on every rank. Collective.

        It is the node's one copy, in place of the lowest rank's gradient, where a slice is in cache
        when it has been added up. To be read, until `share` is called, as must be done.
        """
        mean = self._find(grad).grads[0]
        for part, piece in self.reduce(grad, weight):
            mean[part] = piece
        self.world.local.Barrier()
        return mean

    def share(self, param: Array) -> None:
        """Wait until all peers have updated their slices, and need our gradient no more."""
        self.world.local.Barrier()

    def total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """Add up what the ranks of a node own: node 0's, for the same bits on all. Collective."""
        return self.world.sum(values if self.world.node == 0 else [0.0] * len(values))

    def close(self) -> None:
        """Nothing: the memory goes when the arrays in it go."""

    def _part(self, size: int, rank: int, ranks: int) -> slice:
        """Return the part of an array (size,) that local rank `rank` of `ranks` owns."""
        step = LINE if self.tree is None else GRAIN
        steps = -(-size // step)
        start, stop = (min(size, steps * r // ranks * step) for r in (rank, rank + 1))
        return slice(start, stop)

    def _arrays(self) -> tuple[list[int], list[Sum]]:
        """Return how many gradient arrays each rank of this node has, and how to add them up.

        The latter for each subtree of the node's: with microbatches only.
        """
        members = self.world.members[self.world.node]
        if self.tree is None:
            return [1] * len(members), []
        held = [self.tree.of_rank(rank) or [range(0)] for rank in members]
        parts = [part for parts in held for part in parts]
        return [*map(len, held)], self.tree.sums(self.tree.of_node(self.world.node), parts)

    def _find(self, grad: Array) -> _Known:
        """Return what is known of a gradient."""
        if id(grad) not in self._known:
            raise InvalidArgument("hierarchical: expected a gradient that it allocated")
        return self._known[id(grad)]


@dataclass(frozen=True)
class _Known:
    """What there is to know of an array."""

    owned: slice  #: this rank's part
    grads: list[Array]  #: of all ranks of the node
    mine: list[Array]  #: this rank's among them
    sums: list[Sum]  #: of `grads`, for each subtree of microbatches that the node holds
    homes: list[Array]  #: where the owned parts of these go, but for the last
    lanes: list[Lane]  #: of the owned part, in order; none on one node, or if that part is empty
    state: dict[str, Array]  #: the codec's
    layout: Layout
