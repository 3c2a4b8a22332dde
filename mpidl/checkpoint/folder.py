"""The folder of a run's checkpoints: which there are, which are kept, and whose they are."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl import supervised
from mpidl.checkpoint import manifest
from mpidl.checkpoint.disk import sync_folder
from mpidl.errors import CheckpointError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.world import World

STEP = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")  # .1 and so on: the same step once more
UNFINISHED, REMOVED = ".tmp-", ".removed-"  # in the names of folders that are no checkpoints
LOCK = ".lock"
SEEN_SECONDS = 2.0  # a new file may be that late on the other hosts of a network file system


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, the newest first: by their steps."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            name = STEP.fullmatch(path.name)
            if name is not None and (path / manifest.NAME).exists():
                found.append((int(name[1]), int(name[2] or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """Return the updates of a complete checkpoint. Not collective."""
    name = STEP.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def candidates(path: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint that `path` means, and the next older ones.

    A checkpoint's own folder means that one; another folder the newest in it. Raises
    CheckpointError.
    """
    try:
        path = Path(path).absolute()
        if not STEP.fullmatch(path.name) and not (path / manifest.NAME).exists():
            return complete(path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path!r} is no folder that can be read: {error}") from error
    beside = complete(path.parent)
    return [path, *(beside[beside.index(path) + 1 :] if path in beside else [])]


def free_name(folder: Path, step: int) -> Path:
    """Return a name for a checkpoint of this step that no other one has."""
    path, number = folder / f"step-{step:08}", 0
    while path.exists():
        number += 1
        path = folder / f"step-{step:08}.{number}"
    return path


def publish(unfinished: Path, step: int) -> Path:
    """Give a finished folder its name: here a checkpoint begins to exist. Raises OSError."""
    sync_folder(unfinished)
    path = free_name(unfinished.parent, step)
    supervised.check_lease()
    unfinished.rename(path)
    sync_folder(path.parent)
    return path


def remove(path: Path) -> None:
    """Remove a checkpoint. Whatever happens meanwhile, none is left that is there in part."""
    away = path.with_name(f".{path.name}{REMOVED}{os.urandom(4).hex()}")
    with suppress(OSError):
        path.rename(away)
        shutil.rmtree(away, ignore_errors=True)


class Kept:
    """Which checkpoints of a folder are kept: the last `keep`, and the best. On rank 0 only.

    `best` is the name of a metric, and whether its smallest or largest value counts.
    """

    def __init__(self, folder: Path, keep: int, best: tuple[str, str] | None) -> None:
        self._keep, self._best = keep, best
        self._order = complete(folder)[::-1]  # and then those of this run, as they come
        self._values: dict[Path, float] = {}
        for path in self._order if best else ():
            with suppress(CheckpointError):
                self._note(path, manifest.read(path).metrics)

    def add(self, path: Path, metrics: dict[str, float]) -> None:
        """Count one more, and remove what is not to be kept any more."""
        self._order.append(path)
        self._note(path, metrics)
        kept = set(self._order[-self._keep :])
        best = self.best()
        for old in [p for p in self._order if p not in kept and p != best]:
            remove(old)
            self._order.remove(old)
            self._values.pop(old, None)

    def best(self) -> Path | None:
        """Return the best of them, the last of equals; None where none has the metric."""
        if self._best is None or not self._values:
            return None
        sign = 1 if self._best[1] == "min" else -1
        return min(reversed(self._values), key=lambda path: sign * self._values[path])

    def _note(self, path: Path, metrics: dict[str, float]) -> None:
        if self._best is not None and self._best[0] in metrics:
            self._values[path] = metrics[self._best[0]]


class Claim:
    """A lock on a folder: that of this process, and free when it ends in whatever way.

    Who has it is alone there, and may remove what others left unfinished. Without (another run is
    at work, or the file system has no locks) nothing is removed. On rank 0 only.
    """

    def __init__(self, folder: Path) -> None:
        self._file = -1
        self.had = False
        with suppress(OSError):
            self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.had = True
            for path in folder.iterdir():
                if path.name.startswith(".step-") and (
                    UNFINISHED in path.name or REMOVED in path.name
                ):
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let others have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def make(world: World, folder: Path) -> None:
    """Make `folder`, where all ranks write, for nobody else; one that is there stays. Collective.

    Raises InvalidArgument on every rank where it cannot be written, or is not the same folder on
    all ranks (a local disk of each host, say).
    """
    token = folder / f".seen-{os.urandom(8).hex()}"
    with world.together():
        if world.rank == 0:
            try:
                folder.mkdir(0o700, parents=True, exist_ok=True)
                token.touch()
            except OSError as error:
                raise InvalidArgument(f"checkpoint: cannot write {folder}: {error}") from error
    token = world.broadcast(token)
    end = time.monotonic() + SEEN_SECONDS
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        world.agree(
            None
            if seen
            else InvalidArgument(
                f"checkpoint: {folder} on {world.MPI.Get_processor_name()} is not the folder that "
                "rank 0 sees: expected one on a file system that all hosts share"
            )
        )
    finally:
        if world.rank == 0:
            with suppress(OSError):
                token.unlink()


def told(paths: Sequence[Path]) -> str:
    """Return the words that offer the first of `paths`, the next older checkpoint."""
    if not paths:
        return "; there is no older one"
    return f"; the next older complete one is {paths[0]}: fallback=True takes it"
