"""A sampler that knows what of an epoch is done, and deals the rest out anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpidl.refuse import whole
from mpidl.torch import session as sessions
from mpidl.torch.arguments import flag, length

if TYPE_CHECKING:
    from collections.abc import Iterator


class ElasticSampler(torch.utils.data.Sampler):  # type: ignore[misc]
    """Deals the samples of an epoch out to the ranks in turn, one by one.

    Each rank gets equally many; a few come twice where that needs it. Call `record_batch` after
    each batch, and `set_epoch` at the end of each epoch. In a `TorchState`, what is recorded is
    saved, and after a reset the rest of the epoch is dealt out anew, to the ranks there are then.

    Args:
        dataset: anything with a length, which must not change.
        shuffle: whether the order is random: then it is a pure function of (seed, epoch).
        seed: the same on all ranks.

    Raises InvalidArgument for other values.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0) -> None:
        length("ElasticSampler", dataset)
        self.dataset, self.shuffle = dataset, flag("shuffle", shuffle)
        self.seed = whole("seed", seed)
        self.epoch = 0
        self.processed_num = 0  #: samples that all ranks together have recorded
        self.rank = self.num_replicas = self.num_samples = self.total_size = 0
        self.remaining_indices: list[int] = []
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first sample. Not collective; alike on all ranks."""
        self.epoch, self.processed_num = whole("epoch", epoch), 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:  # noqa: ARG002
        """Note that each rank has done with a batch, of `batch_size` samples on each."""
        self.processed_num += whole("batch_size", batch_size) * self.num_replicas

    @property
    def processed_indices(self) -> set[int]:
        """The samples that were recorded."""
        return set(self._order()[: self.processed_num])

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` takes."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after what was recorded then. Raises InvalidArgument for what is no state."""
        known = state_dict if isinstance(state_dict, dict) else {}
        self.epoch, self.processed_num = (
            whole(f"the state's {key}", known.get(key)) for key in ("epoch", "processed_num")
        )
        self.reset()

    def reset(self) -> None:
        """Deal out what is left of the epoch. Not collective."""
        self.rank, self.num_replicas = sessions.rank(), sessions.size()
        self.remaining_indices = self._order()[self.processed_num :]
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        left = self.remaining_indices
        places = range(self.rank, self.total_size, self.num_replicas)
        return iter([left[place % len(left)] for place in places])

    def __len__(self) -> int:
        """Return the number of this rank's samples that are left."""
        return self.num_samples

    def _order(self) -> list[int]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        found: list[int] = order.tolist()
        return found
