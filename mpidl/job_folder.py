"""The folder that a job script gives to the training in it: MPIDL_OUT."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from mpidl import config

if TYPE_CHECKING:
    from pathlib import Path

    from mpidl.world import World

    Folder = str | Path | None

_trainers = count(1)  # of this process, so far


def defaults(world: World, out: Folder, checkpoint: Folder) -> tuple[Folder, Folder]:
    """Return where a `Trainer` writes: what it was given, else what the job says. Collective.

    Rank 0's MPIDL_OUT counts: itself for `out`, and checkpoints in it for `checkpoint`. Further
    trainers of the process have folders of their own in it, "trainer-2" and so on, so that each
    goes on from its own checkpoints when the same script is started again.
    """
    folder = world.broadcast(config.out())
    if folder is None:
        return out, checkpoint
    number = next(_trainers)
    if number > 1:
        folder = f"{folder}/trainer-{number}"
    return (
        folder if out is None else out,
        f"{folder}/checkpoints" if checkpoint is None else checkpoint,
    )
