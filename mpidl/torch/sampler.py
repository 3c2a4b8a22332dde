"""Which samples are whose, by mpidl's rule: the same global batches on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from mpidl.data.batches import batches
from mpidl.errors import InvalidArgument
from mpidl.refuse import told, whole
from mpidl.torch import session as sessions
from mpidl.torch.errors import internal
from mpidl.tree import Tree
from mpidl.world import current

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.world import World


class Sampler(torch.utils.data.Sampler):  # type: ignore[misc]
    """Yields this rank's part of each global batch: give it to a DataLoader as `batch_sampler`.

    The order is a pure function of (seed, epoch), as in `mpidl.data.batches`: each rank takes a
    contiguous part of each batch. Parts differ in length by one at most, may be empty (`loader`
    makes batches of no samples then), and there are equally many on every rank.

    `state_dict` tells where in the epoch it is, and `load_state_dict` lets iterations begin there,
    on any number of ranks, until one has come to the end of the epoch. Otherwise each begins at the
    first batch.

    Args:
        dataset: anything with a length.
        batch_size: samples of all ranks together.
        seed, shuffle: as in `mpidl.data.batches`.
        microbatches: as given to `mpidl.torch.DataParallel`: a part is then a rank's microbatches.

    Collective. Raises on every rank what `mpidl.data.batches` raises.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        microbatches: int | None = None,
    ) -> None:
        with internal():
            self._batches = batches(
                _Numbers(dataset),
                batch_size,
                world=_ranks(),
                seed=seed,
                shuffle=shuffle,
                microbatches=microbatches,
            )
        self.epoch = 0
        self.start = 0  #: batches of this epoch that iterations leave out
        self.done = 0  #: batches of this epoch that the last iteration has left out, or given out

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.done = start = self.start
        world = _ranks()  # fewer than before, if some have died
        mine = Tree.of(self._batches.microbatches or 1, world).ranges[world.rank]
        here = replace(self._batches, rank=world.rank, size=world.size, mine=mine)
        shards = replace(here, epoch=self.epoch).shards()
        for step, parts in groupby(shards, lambda shard: shard.step):
            if step >= start:
                self.done = step + 1
                yield [sample for part in parts for sample in part.samples.tolist()]
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch at its first batch, or the same one anew. Not collective."""
        self.epoch, self.start, self.done = whole("epoch", epoch), 0, 0

    def state_dict(self) -> dict[str, int | bool]:
        """Return what `load_state_dict` takes."""
        made = self._batches
        return {
            "epoch": self.epoch,
            "done": self.done,
            "batch_size": made.batch_size,
            "seed": made.seed,
            "shuffle": made.shuffle,
            "samples": len(made.dataset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler was. Raises InvalidArgument if its batches were others."""
        mine = self.state_dict()
        known = state if isinstance(state, dict) else {}
        for key in ("batch_size", "seed", "shuffle", "samples"):
            found = known.get(key)
            if type(found) is not type(mine[key]) or mine[key] != found:
                raise InvalidArgument(
                    f"Sampler: {key}={mine[key]}, but the state has {told(found)}"
                )
        self.epoch, self.done = (
            whole(f"Sampler: the state's {key}", known.get(key)) for key in ("epoch", "done")
        )
        self.start = self.done % len(self)  # a finished epoch begins again


def _ranks() -> World:
    return sessions.active().world if sessions.is_initialized() else current()


class Loader:
    """The batches of a DataLoader with a `Sampler`, counted as they are given out."""

    def __init__(self, sampler: Sampler, dataloader: Any) -> None:
        self.sampler, self.dataloader = sampler, dataloader
        self._done = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self._done = self.sampler.start
        for batch in self.dataloader:
            self._done += 1  # workers of the loader are ahead of this
            yield batch

    @property
    def epoch(self) -> int:
        """The number of the epoch."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch at its first batch. Not collective."""
        self.sampler.set_epoch(epoch)
        self._done = 0

    def epochs(self, stop: int) -> Iterator[int]:
        """Yield the number of each epoch that is not done, up to `stop`, and begin it.

        For a loop that goes on in the middle of one, after `load_state_dict`: `for epoch in
        loader.epochs(5): for x, y in loader: ...`.
        """
        whole("epochs", stop)
        if self._done == len(self):
            self.set_epoch(self.epoch + 1)
        while self.epoch < stop:
            yield self.epoch
            self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return where it is: after the batches that were given out."""
        return {**self.sampler.state_dict(), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was, on any number of ranks."""
        self.sampler.load_state_dict(state)
        self._done = self.sampler.done


def loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    microbatches: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Any,
) -> Loader:
    """Return a loader of this rank's part of each global batch of `batch_size`. Collective.

    See `Sampler`, which raises the same. `options` are those of torch.utils.data.DataLoader, such
    as `num_workers`. A part without samples has tensors of length 0.
    """
    if collate_fn is not None and not callable(collate_fn):
        raise InvalidArgument(f"collate_fn={told(collate_fn)}: expected a function, or None")
    sampler = Sampler(dataset, batch_size, shuffle=shuffle, seed=seed, microbatches=microbatches)
    collate = _Collate(dataset, collate_fn or torch.utils.data.default_collate)
    made = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, **options
    )
    return Loader(sampler, made)


class _Collate:
    """Makes batches, also of no samples: as of one, with that one cut off."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate(samples) if samples else _emptied(self.collate([self.dataset[0]]))


def _emptied(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_emptied, batch))
    if isinstance(batch, (list, tuple)) and any(isinstance(x, torch.Tensor) for x in batch):
        return type(batch)(map(_emptied, batch))
    return batch[:0]


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a data set's samples: what is dealt out."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Any) -> tuple[Any, Any]:
        return indices, indices
