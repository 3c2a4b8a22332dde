"""What a `Trainer` need not do any more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from mpidl import data


@dataclass
class Done:
    """What was trained already, in this run or in another one that it goes on from."""

    history: list[dict[str, Any]] = field(default_factory=list)  #: each epoch that was completed
    left: int = 0  #: the last of these that `fit` was not yet asked for
    position: dict[str, Any] = field(default_factory=dict)  #: within the epoch that follows
    told: str | None = None  #: from where, in words

    def take(self, epochs: int) -> list[dict[str, Any]]:
        """Return what there is of the next `epochs` epochs that `fit` is asked for."""
        done = min(epochs, self.left)
        first = len(self.history) - self.left
        self.left -= done
        return self.history[first : first + done]

    def begin(self, batches: data.Batches) -> tuple[data.Batches, list[float], float]:
        """Return what is left of an epoch, its losses so far, of all ranks, and the seconds.

        Raises InvalidArgument on every rank where the epoch that was begun was another one.
        """
        position, self.position = self.position, {}
        if not position:
            return batches, [], 0.0
        now = place(batches)
        if any(position[name] != now[name] for name in now):
            before = {name: position[name] for name in now}
            raise InvalidArgument(
                f"resumed in the middle of an epoch of {before}, which cannot go on with {now}"
            )
        return replace(batches, begin=position["batch"]), position["losses"], position["seconds"]


def place(batches: data.Batches) -> dict[str, Any]:
    """Return what must be the same for an epoch to go on in its middle."""
    return {
        "epoch": batches.epoch,
        "seed": batches.seed,
        "batch_size": batches.batch_size,
        "samples": len(batches.dataset),
        "shuffle": batches.shuffle,
    }
