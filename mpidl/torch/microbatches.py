"""Microbatches of a torch module: the same bits on any number of ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from mpidl.buffers import BufferMean
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.microbatches import Microbatches
from mpidl.torch.arguments import WRONG, ours
from mpidl.torch.buffers import Buffers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpidl.array import Array
    from mpidl.bucket import Bucket
    from mpidl.strategies import Choice
    from mpidl.torch.gradients import Gradients
    from mpidl.world import World


MEANS = (torch.float32, torch.float64)  # of the other buffers, those of the first count


class Loop:
    """The microbatches of one step after the other, each with random numbers of its own.

    These are a function of `seed`, by default what all ranks began with, the number of the `step`
    and that of the microbatch. Afterwards torch's generators go on as if nothing had been drawn.
    Buffers of floats become means over the microbatches; of other buffers those of the first count.
    """

    def __init__(
        self,
        number: int,
        world: World,
        choice: Choice,
        module: Any,
        buckets: Sequence[Bucket],
        gradients: Gradients,
    ) -> None:
        self.seed = world.broadcast(torch.initial_seed())
        self.step = 0
        self._world, self._gradients = world, gradients
        means = BufferMean(lambda: _floats(module), choice.strategy)
        self._others = Buffers(module, world, counts=lambda b: b.dtype not in MEANS)
        self.sums = Microbatches(number, world, buckets, choice.partials, means, gradients.noise)
        gradients.microbatches = self.sums

    def restart(self) -> None:
        """Begin with the buffers that are there now. Collective."""
        self.sums.means.restart()

    def run(self, batch: tuple[Any, ...], dim: int) -> Iterator[Any]:
        """Yield parts of this rank's `batch`, and average at the end. Collective."""
        sums, leaves, mine = self.sums, self.sums.tree.leaves, self.sums.mine
        rows, problem = _rows(batch, dim)
        total = int(self._world.sum([rows])[0])
        ends = [total * leaf // leaves for leaf in ((*mine, mine.stop) if mine else (0, 0))]
        if problem is None and rows != ends[-1] - ends[0]:
            problem = InvalidArgument(
                f"{rows} of the {total} rows of a batch, but its microbatches {mine.start} to "
                f"{mine.stop - 1} of {leaves} have {ends[-1] - ends[0]}: see "
                f"mpidl.torch.Sampler(..., microbatches={leaves})"
            )
        parts: list[Any] = []
        if problem is None:
            parts, problem = _cut(batch, dim, ends)
        sums.unit = total / leaves
        leading = next((i for i in range(leaves) if total * (i + 1) // leaves), 0)  # that has rows
        gradients, generator = self._gradients, torch.get_rng_state()
        before = first = self._others.values()
        gradients.start_microbatches()
        try:
            for leaf, (start, end) in enumerate(pairwise(ends), mine.start):
                if start < end and problem is None:
                    torch.manual_seed(self._seed_of(leaf))
                    self._others.restore(before)
                    yield parts[leaf - mine.start]
                    if leaf == leading:
                        first = self._others.values()
                gradients.add_microbatch(float(end - start), problem)
        finally:
            torch.set_rng_state(generator)
            gradients.wanted = True
        if gradients.average():
            self.step += 1
            sums.means.publish(1 / leaves)
            self._others.restore(first)
            self._others.broadcast(sums.tree.holder(leading))

    def _seed_of(self, leaf: int) -> int:
        key = np.random.SeedSequence([self.seed, self.step, leaf])
        return int(key.generate_state(1, np.uint64)[0])


def _floats(module: Any) -> dict[str, Array]:
    return {
        name: buffer.detach().numpy()
        for name, buffer in module.named_buffers()
        if buffer.dtype in MEANS
    }


def _rows(batch: tuple[Any, ...], dim: int) -> tuple[int, MpidlError | None]:
    """Return how many rows a batch has, and what is wrong with it, if anything."""
    try:
        shapes = [tuple(x.shape) for x in pytree.tree_leaves(batch) if torch.is_tensor(x)]
    except WRONG as error:  # of a tensor that has no shape
        return 0, ours(error)
    rows = {shape[dim] if dim < len(shape) else -1 for shape in shapes}
    if not rows or -1 in rows or len(rows) > 1:
        text = f"split: tensors of shapes {shapes}: expected one or more, of equally many rows"
        return 0, InvalidArgument(text)
    return rows.pop(), None


def _cut(batch: tuple[Any, ...], dim: int, ends: list[int]) -> tuple[list[Any], MpidlError | None]:
    """Return the rows of all tensors from each end to the next, and what is wrong, if anything."""
    try:
        return [
            _part(batch, dim, start - ends[0], end - start) for start, end in pairwise(ends)
        ], None
    except WRONG as error:  # of a tensor that cannot be cut
        return [], ours(error)


def _part(batch: tuple[Any, ...], dim: int, start: int, rows: int) -> Any:
    parts = pytree.tree_map(
        lambda x: x.narrow(dim, start, rows) if torch.is_tensor(x) else x, batch
    )
    return parts[0] if len(parts) == 1 else parts
