"""Adasum: gradients that agree are averaged, those that have nothing in common are added."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpidl import clock
from mpidl.array import blocks, namespace, synchronize, to_numpy
from mpidl.errors import InvalidArgument
from mpidl.staging import Staging
from mpidl.strategies.base import around, in_turn, private, publish_in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages, Layout, Stream
    from mpidl.world import World

DOT_ELEMENTS = 1 << 13  # OpenBLAS uses threads, whose number changes the bits, from 10,000 on


@final
class Adasum:
    """Every rank owns everything; gradients are combined in pairs, up a binary tree of ranks.

    Two gradients a and b of a layer become their sum, less half of the projection of each on the
    other (Maleki et al. 2020, arXiv:2006.02924):

        adasum(a, b) = (1 - a.b / (2 a.a)) a + (1 - a.b / (2 b.b)) b

    Equal ones give that gradient, as the mean does; orthogonal ones their sum. So the learning
    rate is that of one rank: it needs no scaling with the number of ranks. Layers are the arrays
    of the `layout` given to `allocate`, each combined on its own; dot products are in float64.
    It is not the mean over samples: a rank's own mean gradient counts the same whatever its
    weight, but with weight 0 it counts as zero, and adasum(a, 0) = a.

    The tree is fixed, and each part of the result is computed once: same bits in every run and on
    all ranks. Let Q be the largest power of two up to P. Ranks r and r+Q are combined first, where
    there are such; then blocks of ranks [0], [1], ... in pairs, then [0, 1], [2, 3], ... and so on
    up to Q. A pair of blocks holds its two gradients in parts: rank r and its partner halve their
    part, exchange halves, and sum the dot products over both blocks (recursive vector halving and
    distance doubling, as in the paper). The halves return the same way. So each rank sends
    2 (Q-1)/Q of the array, as in a ring; those below P-Q send 3/2 of it more.
    """

    shared: ClassVar[bool] = False

    def __init__(self, world: World) -> None:
        self.world, self.staging = world, Staging(world)
        self._layers: dict[int, list[slice]] = {}  # by id of the gradient
        self._arrived: dict[tuple[Any, str], Array] = {}  # what a partner sends, by kind of array

    def allocate(self, size: int, dtype: Any, xp: Any, layout: Layout = ()) -> tuple[Array, Array]:
        """Return zeroed private arrays (size,). Without `layout` all of it is one layer.

        What lies outside of the layers is padding: it stays as it is.
        """
        param, grad = private(size, dtype, xp, self.world)
        layers = [slice(start, start + math.prod(shape)) for start, shape in layout]
        self._layers[id(grad)] = layers or [slice(0, size)]
        weakref.finalize(grad, self._layers.pop, id(grad)).atexit = False
        return param, grad

    def owned(self, size: int) -> slice:
        """Return all of it."""
        return slice(0, size)

    def reduce(self, grad: Array, weight: float) -> Averages:
        """Replace `grad` (n,) by the Adasum of all ranks' gradients. Collective.

        `weight` only tells whether this rank has one. What is not finite stays so.
        """
        if id(grad) not in self._layers:
            raise InvalidArgument("adasum: expected a gradient that it allocated")
        if not weight:  # whatever it holds
            grad.fill(0)
        if self.world.size > 1:
            clock.moved_bytes += around(grad.nbytes, self.world.size)
            with (
                self.staging.host(grad) as buffer,
                np.errstate(over="ignore", invalid="ignore", divide="ignore"),
            ):
                self._combine_all(buffer, self._layers[id(grad)])
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
        """Give back the memory for messages."""
        self.staging.close()
        self._arrived.clear()

    def _combine_all(self, buffer: Array, layers: list[slice]) -> None:
        """Combine the ranks' `buffer` (n,), in place."""
        rank, size = self.world.rank, self.world.size
        levels = size.bit_length() - 1
        power = 1 << levels
        whole, nothing = slice(0, buffer.size), slice(0, 0)
        beyond = rank ^ power  # one of the two ranks is beyond the largest power of two
        paired, higher = beyond < size, rank >= power
        if paired:  # and the lower goes on for both
            kept, given = self._combine(buffer, whole, layers, [beyond])
            sent, got = (kept, nothing) if higher else (nothing, given)
            self._swap(beyond, buffer[sent], buffer[got])
        if not higher:
            part, back = whole, []
            for level in range(levels):
                peers = [rank ^ (1 << bit) for bit in range(level + 1)]
                part, given = self._combine(buffer, part, layers, peers)
                back.append((peers[-1], part, given))
            for partner, kept, given in reversed(back):
                self._swap(partner, buffer[kept], buffer[given])
        if paired:
            sent, got = (nothing, whole) if higher else (whole, nothing)
            self._swap(beyond, buffer[sent], buffer[got])

    def _combine(
        self, buffer: Array, part: slice, layers: list[slice], peers: list[int]
    ) -> tuple[slice, slice]:
        """Combine half of `part` with the last of `peers`, which does the other half.

        That one holds the other gradient in the same part. The peers, each in its turn, are whom to
        exchange dot products with for their sums. Returns the half of this rank, and the other's.
        """
        partner = peers[-1]
        first = self.world.rank < partner
        middle = (part.start + part.stop) // 2
        halves = slice(part.start, middle), slice(middle, part.stop)
        kept, given = halves if first else halves[::-1]
        mine, theirs = buffer[kept], self._memory(buffer, kept.stop - kept.start)
        self._swap(partner, buffer[given], theirs)
        pieces = list(_within(layers, kept))
        a, b = (mine, theirs) if first else (theirs, mine)
        dots = _dots(a, b, pieces, len(layers))
        for peer in peers:  # the order of the addends does not matter: same bits on both
            more = np.empty_like(dots)
            self._swap(peer, dots, more)
            dots += more
        factors = _factors(dots, buffer.dtype)
        ours, others = factors if first else factors[::-1]
        for i, piece in pieces:
            for block in blocks(mine[piece]):
                own, other = mine[piece][block], theirs[piece][block]
                own *= float(ours[i])
                other *= float(others[i])
                own += other
        return kept, given

    def _swap(self, partner: int, leaving: Array, arriving: Array) -> None:
        """Send an array to `partner`, and receive another."""
        synchronize(leaving)
        comm = self.world.comm
        self.world.wait([comm.Irecv(arriving, partner), comm.Isend(leaving, partner)])

    def _memory(self, like: Array, size: int) -> Array:
        """Return an array (size,) to receive into; the same memory in every call."""
        key = namespace(like), like.dtype.str
        if key not in self._arrived or self._arrived[key].size < size:
            self._arrived[key] = key[0].empty(size, like.dtype)
        return self._arrived[key][:size]


def _within(layers: list[slice], part: slice) -> Iterator[tuple[int, slice]]:
    """Yield the number of each layer that has elements in `part`, and where in `part`."""
    for i, layer in enumerate(layers):
        start, stop = max(layer.start, part.start), min(layer.stop, part.stop)
        if start < stop:
            yield i, slice(start - part.start, stop - part.start)


def _dots(
    a: Array, b: Array, pieces: list[tuple[int, slice]], layers: int
) -> npt.NDArray[np.float64]:
    """Return a.a, a.b and b.b of each layer's piece, (3, layers), on the CPU."""
    xp = namespace(a)
    dots = xp.zeros((3, layers))
    for i, piece in pieces:
        for block in blocks(a[piece], DOT_ELEMENTS * a.itemsize):
            x, y = (array[piece][block].astype(np.float64, copy=False) for array in (a, b))
            dots[0, i] += xp.dot(x, x)
            dots[1, i] += xp.dot(x, y)
            dots[2, i] += xp.dot(y, y)
    return to_numpy(dots)


def _factors(
    dots: npt.NDArray[np.float64], dtype: np.dtype[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return what to multiply a and b by, (layers,) each, given `dots` (3, layers).

    That is 1 where a gradient is zero, or so small beside the other that there is no such number
    in their dtype; and where one is not finite, which then stays so.
    """
    aa, ab, bb = dots
    shares = ab / (2 * aa), ab / (2 * bb)
    most = np.finfo(dtype).max
    fa, fb = (np.where(np.abs(share) <= most, 1 - share, 1.0) for share in shares)
    return fa, fb
