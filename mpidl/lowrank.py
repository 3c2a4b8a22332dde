"""PowerSGD: averages matrices between nodes as products of thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl.array import UPDATE_BLOCK_BYTES
from mpidl.exchange import Exchange, Lane, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpidl.array import Array, Layout, Stream
    from mpidl.codecs.powersgd import PowerSGD
    from mpidl.world import World


@dataclass(frozen=True)
class Matrix:
    """Whole rows of a layer's gradient, that a lane owns: (rows, columns) from `start` on."""

    start: int
    rows: int
    columns: int

    @property
    def part(self) -> slice:
        """Where they lie in the flat array."""
        return slice(self.start, self.start + self.rows * self.columns)


@final
class LowRank:
    """In place of `Exchange`: what it sends of a matrix is of low rank.

    PowerSGD (Vogels et al. 2019, algorithms 1 and 2). With M the sum of a node's gradients and of
    what was left out before, and Q (columns, rank) that of the last step:

        P = the sum over nodes of M Q, made orthonormal
        Q = the sum over nodes of M^T P
        mean = P Q^T;  left out on this node: M - P (M^T P)^T

    One step of power iteration, which goes on from step to step. The projection is linear: what
    the nodes leave out adds up to exactly what the mean lacks. Each rank does so with the rows it
    owns; layers of several axes count as matrices of (first axis, all others). What is no such
    matrix is averaged as it is.

    Each node makes the product P Q^T by itself: for the same bits on all of them, they need
    processors for which BLAS chooses the same kernels.
    """

    def __init__(self, world: World, codec: PowerSGD) -> None:
        self.rank = codec.rank
        self._exchange = Exchange(world)

    @property
    def sent_bytes(self) -> int:
        """To other ranks, since this was made."""
        return self._exchange.sent_bytes

    def state(
        self, owned: slice, lanes: Sequence[Lane], dtype: Any, layout: Layout
    ) -> dict[str, Array]:
        """Return what must be kept from step to step, for the slice `owned` of an array."""
        first = []  # directions of each matrix, the same on all nodes
        for lane in lanes:
            for m in self._matrices(lane, layout):
                rng = np.random.default_rng([lane.part.start, m.start])
                first.append(rng.standard_normal((m.columns, self.rank)).astype(dtype))
        return {
            "codec_error": np.zeros(owned.stop - owned.start, dtype),
            "codec_directions": np.concatenate([np.empty((0, self.rank), dtype), *first]),
        }

    def average(self, sources: Sequence[Source]) -> Stream:
        """Yield the mean over nodes of what each source's sums yield, in order. Collective.

        With the number of the source. The gradients are written over.
        """
        for number, source in enumerate(sources):
            for part, total in source.sums:
                source.grad[part] = total
            end = 0
            for lane in source.lanes:
                matrices = list(self._matrices(lane, source.layout))
                start, end = end, end + sum(m.columns for m in matrices)
                self._average(source, lane, matrices, source.state["codec_directions"][start:end])
                yield number, lane.part, source.grad[lane.part]

    def _average(
        self, source: Source, lane: Lane, matrices: list[Matrix], directions: Array
    ) -> None:
        """Average one lane; `directions` (columns of all its matrices, rank) become the next."""
        grad, rank, first = source.grad, self.rank, source.owned.start
        missing = source.state["codec_error"]
        others = list(_gaps(lane.part, [m.part for m in matrices]))
        sent = sum(gap.stop - gap.start for gap in others)
        flat = np.empty(sent + rank * sum(m.rows for m in matrices), grad.dtype)
        np.concatenate([flat[:0], *(grad[gap] for gap in others)], out=flat[:sent])

        turns = []  # of each matrix: it, what was left out, P, and Q
        place, column = sent, 0
        for m in matrices:
            shape = m.rows, m.columns
            matrix = grad[m.part].reshape(shape)
            error = missing[m.start - first : m.part.stop - first].reshape(shape)
            p = flat[place : place + m.rows * rank].reshape(m.rows, rank)
            q = directions[column : column + m.columns]
            for rows in _row_blocks(matrix):
                np.add(matrix[rows], error[rows], out=matrix[rows])
                np.matmul(matrix[rows], q, out=p[rows])
            turns.append((matrix, error, p, q))
            place, column = place + p.size, column + m.columns
        self._sum(flat, lane)

        for matrix, error, p, q in turns:
            p[:] = np.linalg.qr(p)[0]
            np.matmul(matrix.T, p, out=q)
            for rows in _row_blocks(matrix):
                np.matmul(p[rows], q.T, out=error[rows])
                np.subtract(matrix[rows], error[rows], out=error[rows])
        self._sum(directions.reshape(-1), lane)

        for matrix, _, p, q in turns:
            np.matmul(p, q.T, out=matrix)
        start = 0
        for gap in others:
            size = gap.stop - gap.start
            grad[gap] = flat[start : start + size]
            start += size

    def _sum(self, values: Array, lane: Lane) -> None:
        """Replace `values` (n,) by their sum over the lane. Collective."""
        if not values.size:  # nor on any other rank
            return
        whole = slice(0, values.size)
        here = Lane(whole, lane.ranks, lane.place)
        source = Source(values, whole, iter([(whole, values)]), [here], {})
        for _ in self._exchange.average([source]):
            pass

    def _matrices(self, lane: Lane, layout: Layout) -> Iterator[Matrix]:
        """Yield the rows of each layer in a lane, where they are worth a product."""
        for start, shape in layout:
            columns = math.prod(shape[1:])
            if len(shape) < 2 or not columns:
                continue
            low = -(-max(lane.part.start - start, 0) // columns)
            high = min((lane.part.stop - start) // columns, shape[0])
            rows = high - low
            if rows > 0 and 2 * self.rank * (rows + columns) < rows * columns:
                yield Matrix(start + low * columns, rows, columns)


def _gaps(whole: slice, parts: Sequence[slice]) -> Iterator[slice]:
    """Yield what is left of `whole` between ordered parts."""
    end = whole.start
    for part in parts:
        if end < part.start:
            yield slice(end, part.start)
        end = part.stop
    if end < whole.stop:
        yield slice(end, whole.stop)


def _row_blocks(matrix: Array) -> Iterator[slice]:
    """Cut (rows, columns) into rows that stay in cache."""
    step = max(1, UPDATE_BLOCK_BYTES // (matrix.shape[1] * matrix.itemsize))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
