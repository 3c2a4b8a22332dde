"""Checkpoints: the whole state of a training, from which any number of ranks goes on.

Files are safetensors and JSON; nothing is ever unpickled. docs/checkpoints.md tells how to use it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpidl.checkpoint import folder as folders
from mpidl.checkpoint.checkpoints import Best, Checkpoints
from mpidl.checkpoint.reader import look, weights
from mpidl.errors import CheckpointError, InvalidArgument
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mpidl.checkpoint.manifest import Manifest
    from mpidl.checkpoint.state import State
    from mpidl.parallel import DataParallel
    from mpidl.trainer import Trainer
    from mpidl.world import World

__all__ = ["Checkpoints", "Loaded", "load", "restore", "save", "weights"]


@dataclass(frozen=True)
class Loaded:
    """What was loaded, and what of it could not be kept."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]  #: what began anew, where ranks or nodes are others

    @property
    def step(self) -> int:
        """Updates made."""
        return self.manifest.step

    @property
    def extra(self) -> dict[str, Any]:
        """What was given to `save`."""
        return self.manifest.extra


def save(
    what: DataParallel | Trainer,
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 3,
    best: Best = None,
) -> Path | None:
    """Write a checkpoint below `folder`, and return its path when it is on the disk. Collective.

    The last `keep` are kept, and the best: see `Checkpoints`, which writes while training goes on.
    `extra` is for your own loop: what JSON has, the same on every rank, such as the epoch.

    Returns None where it could not be written, after a warning; see `Checkpoints`, for what is
    raised too.
    """
    replica, told = _parts(what)
    made = Checkpoints(_state(replica), folder, keep=keep, best=best)
    try:
        made.save(replica.steps, metrics=metrics, extra=extra, made_by=made_by(replica), **told)
    finally:
        made.close()
    return None if made.failed else made.last


def load(what: DataParallel | Trainer, path: str | Path, *, fallback: bool = False) -> Loaded:
    """Give `what` the state of a checkpoint. Collective.

    `path` is a checkpoint, or a folder of them: then the newest. Ranks, nodes, strategy and buckets
    may be others than those that saved it; where they are the same, all goes on bit for bit. With
    `fallback` a damaged one is passed over, with a warning, for the next older one.

    Raises CheckpointError on every rank, before anything is changed: there is none; a file is
    missing, cut short or damaged; it is of another model or optimizer.
    """
    replica, _ = _parts(what)
    loaded = restore(_state(replica), path, fallback=fallback)
    if what is not replica:
        what.epochs = loaded.manifest.epoch  # type: ignore[union-attr]
    return loaded


def restore(state: State, path: str | Path, *, fallback: bool = False) -> Loaded:
    """Give `state` what a checkpoint holds; see `load`. Collective."""
    world = state.world
    found: list[Path] = []
    with world.together():
        if world.rank == 0:
            found = folders.candidates(path)
            if not found:
                raise CheckpointError(f"{path}: no checkpoint is complete there")
    found = world.broadcast(found)
    for number, one in enumerate(found):
        older = found[number + 1 :]
        try:
            return _restore(state, world, one)
        except CheckpointError as error:
            if not fallback or not older:
                offer = CheckpointError(f"{error}{folders.told(older)}")
                offer.collective = True
                raise offer from error
            if world.rank == 0:
                warnings.warn(f"{error}; going on from {older[0]}", RuntimeWarning, stacklevel=3)
    raise AssertionError


def _restore(state: State, world: World, path: Path) -> Loaded:
    stored = None
    with world.together():
        if world.rank == 0:
            stored = look(path)
    stored = world.broadcast(stored)
    assert stored is not None
    notes = state.restore(stored)
    return Loaded(path, stored.manifest, tuple(notes))


def made_by(replica: DataParallel) -> dict[str, Any]:
    """Return what a manifest tells its readers of how it came about."""
    from mpidl import __version__

    world, choice = replica.world, replica.choice
    return {
        "mpidl": __version__,
        "nodes": world.nodes,
        "strategy": choice.name,
        "codec": None if choice.codec is None else str(choice.codec),
        "optimizer": repr(replica.optimizer),
    }


def _state(replica: DataParallel) -> State:
    from mpidl.checkpoint.state import EngineState

    return EngineState(replica)


def _parts(what: Any) -> tuple[DataParallel, dict[str, Any]]:
    from mpidl.parallel import DataParallel

    if isinstance(what, DataParallel):
        return what, {}
    replica = getattr(what, "replica", None)
    if not isinstance(replica, DataParallel):
        raise InvalidArgument(
            f"checkpoint: expected a DataParallel or a Trainer, found {told(what)}"
        )
    return replica, {"epoch": what.epochs}
