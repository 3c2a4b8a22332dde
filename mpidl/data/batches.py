"""The global batch, and this rank's shard of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpidl.array import device_namespace, to_device
from mpidl.errors import BatchTooLarge, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array
    from mpidl.data.dataset import Dataset
    from mpidl.world import World


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch, as this rank sees them. Made by `batches`.

    The order of the samples is a pure function of (seed, epoch). Every rank takes a contiguous
    shard of each global batch; shards differ in length by one at most, may be empty, and there
    are equally many on every rank, so nobody waits at the end of an epoch.
    """

    dataset: Dataset
    batch_size: int
    rank: int
    size: int
    seed: int
    epoch: int
    shuffle: bool
    device: str
    load: Callable[[Batches], Iterator[tuple[Array, Array]]] | None = None  #: a `Loader`'s
    begin: int = 0  #: the first step that is yielded: those before it were made by another run

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return self._take() if self.load is None else self.load(self)

    def _take(self) -> Iterator[tuple[Array, Array]]:
        for _, shard in self.shards():
            x, y = self.dataset.take(shard)
            yield to_device(x, self.device), to_device(y, self.device)

    def shards(self) -> Iterator[tuple[int, Array]]:
        """Yield, for each step from `begin` on, this rank's samples, and where they begin.

        That is the place of the first in the global batch.
        """
        n = len(self.dataset)
        order = np.arange(n)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for start in range(self.begin * self.batch_size, n, self.batch_size):
            batch = order[start : start + self.batch_size]
            first, end = (len(batch) * rank // self.size for rank in (self.rank, self.rank + 1))
            yield first, batch[first:end]


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    world: World | None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    device: str = "cpu",
) -> Batches:
    """Return this rank's shards of one epoch's global batches of `batch_size` samples.

    Collective; without a `world` (None) it is not, and the shard is the whole batch. Raises on
    every rank: BatchTooLarge where the batch is larger than the data set, InvalidArgument for a
    batch below 1 or a negative seed or epoch, RankMismatch where the ranks differ in any of these.
    """
    made = Batches(
        dataset,
        batch_size,
        rank=world.rank if world else 0,
        size=world.size if world else 1,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        device=device,
    )
    if world is None:
        _check(made)
        return made
    with world.together():
        _check(made)
    world.same(
        f"{len(dataset)} samples, batch_size={batch_size}, {seed=}, {epoch=}, {shuffle=}",
        "batches",
    )
    return made


def _check(made: Batches) -> None:
    n = len(made.dataset)
    if made.batch_size < 1:
        raise InvalidArgument(f"batch_size={made.batch_size}: expected 1 or more")
    if made.seed < 0 or made.epoch < 0:
        raise InvalidArgument(f"seed={made.seed}, epoch={made.epoch}: expected 0 or more")
    if made.batch_size > n:
        raise BatchTooLarge(
            f"batch_size={made.batch_size} is larger than the data set of {n} samples "
            "(batch_size counts the samples of all ranks together)"
        )
    device_namespace(made.device)
