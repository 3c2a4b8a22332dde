"""The global batch, and this rank's shard of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import clock
from mpidl.array import device_namespace, to_device
from mpidl.data.dataset import length
from mpidl.errors import BatchTooLarge, InvalidArgument
from mpidl.refuse import told, whole
from mpidl.tree import Tree

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
    are equally many on every rank, so nobody waits at the end of an epoch. With `microbatches` a
    shard is one of these, and a rank takes several of them, or an empty one, from each batch.
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
    microbatches: int | None = None  #: of each global batch
    mine: range = range(0)  #: this rank's among them
    begin: int = 0  #: the first step that is yielded: those before it were made by another run

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return clock.fetched(self._take() if self.load is None else self.load(self))

    def _take(self) -> Iterator[tuple[Array, Array]]:
        for shard in self.shards():
            x, y = self.dataset.take(shard.samples)
            yield to_device(x, self.device), to_device(y, self.device)

    def shards(self) -> Iterator[Shard]:
        """Yield what this rank takes, step by step, from `begin` on."""
        n = len(self.dataset)
        order = np.arange(n)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        parts, mine = self.size, range(self.rank, self.rank + 1)
        if self.microbatches is not None:
            parts, mine = self.microbatches, self.mine
        for step, start in enumerate(
            range(self.begin * self.batch_size, n, self.batch_size), self.begin
        ):
            batch = order[start : start + self.batch_size]
            ends = [len(batch) * part // parts for part in ((*mine, mine.stop) if mine else (0, 0))]
            for number, (first, end) in enumerate(pairwise(ends), 1):
                last = number == len(ends) - 1
                yield Shard(step, len(batch), first, batch[first:end], last)


@dataclass(frozen=True)
class Shard:
    """What a rank takes from a global batch, for one call of its model."""

    step: int  #: of this epoch
    batch_size: int  #: of the global batch, the last of which may be shorter
    first: int  #: place in the global batch where it begins
    samples: Array  #: indices (n,)
    last: bool  #: of what this rank takes from this batch


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    world: World | None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    device: str = "cpu",
    microbatches: int | None = None,
) -> Batches:
    """Return this rank's shards of one epoch's global batches of `batch_size` samples.

    With `microbatches` = V each global batch is cut in V parts, the same for any number of ranks,
    and this yields one of them after the other: see `DataParallel`.

    Collective; without a `world` (None) it is not, and the shard is the whole batch. Raises on
    every rank: BatchTooLarge where the batch is larger than the data set, InvalidArgument for a
    batch below 1 or a negative seed or epoch, RankMismatch where the ranks differ in any of these.

    ```pycon
    >>> import numpy as np
    >>> from mpidl import data
    >>> train = data.ArrayDataset(np.ones((5, 2)), np.arange(5))
    >>> [y.tolist() for x, y in data.batches(train, 2, world=None, shuffle=False)]
    [[0, 1], [2, 3], [4]]

    ```
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
        microbatches=microbatches,
    )
    if world is None:
        _check(made)
        mine = range(microbatches or 0)
    else:
        with world.together():
            _check(made)
        world.same(
            f"{len(dataset)} samples, batch_size={batch_size}, {seed=}, {epoch=}, {shuffle=}, "
            f"{microbatches=}",
            "batches",
        )
        mine = Tree.of(microbatches or 1, world).ranges[world.rank]
    return replace(made, mine=mine)


def size_in(epoch: int, batch_size: Any) -> Any:
    """Return `batch_size`, or what it gives for `epoch` where it is a function. Not collective.

    What the function raises comes back as its value, for `batches` to refuse on every rank.
    """
    if not callable(batch_size):
        return batch_size
    try:
        return batch_size(epoch)
    except Exception as error:
        return error


def _check(made: Batches) -> None:
    n = length(made.dataset, "batches")
    whole("batch_size", made.batch_size, 1)
    whole("seed", made.seed)
    whole("epoch", made.epoch)
    if not isinstance(made.shuffle, (bool, np.bool_)):
        raise InvalidArgument(f"shuffle={told(made.shuffle)}: expected True or False")
    if made.microbatches is not None:
        Tree(made.microbatches, ((0,),))
    if made.batch_size > n:
        raise BatchTooLarge(
            f"batch_size={made.batch_size} is larger than the data set of {n} samples "
            "(batch_size counts the samples of all ranks together)"
        )
    device_namespace(made.device)
