"""Going on from what the nodes of a run's former attempt still hold in memory.

`mpidl run --restarts` starts a job again when a host has died. Each node's snapshots
(`mpidl.elastic`) lie under /dev/shm, and outlive its ranks: the newest that any node holds, of
whatever ranks there were, is given to all.
"""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl import config
from mpidl.checkpoint import folder as folders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.world import World

MEMORY, PREFIX = Path("/dev/shm"), "mpidl-"
PIECE_BYTES = 64 << 20  # of a file, on its way to other nodes

_made = 0  # trainers of this process that were given a name


def name(world: World) -> str:
    """Return the name of a folder of snapshots, but for the node. Collective.

    It tells the run, where `mpidl run --restarts` watches one, its attempt, and which of its
    trainers this is: they are made in the same order in each attempt.
    """
    global _made
    run = config.run_id()
    if run is None:
        return world.broadcast(os.urandom(6).hex())
    _made += 1
    return f"{run}-{_made}-{config.attempt()}"


def bring(world: World, own: Path, newer_than: int) -> Path | None:
    """Return the newest snapshot of former attempts, now in each node's folder `own`. Collective.

    None where there is none of more updates than `newer_than`, or where it does not fit into a
    node's memory. Theirs are removed.
    """
    if not config.attempt():
        return None
    run, number, _ = own.name.removeprefix(PREFIX).split("-", 2)
    former = [path for path in MEMORY.glob(f"{PREFIX}{run}-{number}-*") if path != own]
    mine = [path for path in former for path in folders.complete(path)]
    held = world.gather([(folders.step_of(path), path) for path in mine])
    newest = max((step for paths in held for step, _ in paths), default=-1)
    found = None
    if newest > newer_than:
        found = own / f"step-{newest:08}"
        problem = _share(world, [dict(paths).get(newest) for paths in held], found)
        if problem:
            found = None
            if world.rank == 0:
                warnings.warn(f"update {newest} is lost: {problem}", RuntimeWarning, stacklevel=4)
    world.barrier()
    if world.local_rank == 0:
        for path in former:
            shutil.rmtree(path, ignore_errors=True)
    return found


def _share(world: World, holders: list[Path | None], to: Path) -> str | None:
    """Let each node have a copy of what the first of `holders` holds. Returns what went wrong."""
    root = next(rank for rank, path in enumerate(holders) if path is not None)
    source = holders[root]
    assert source is not None
    with_it = {node for node, ranks in enumerate(world.members) if any(holders[r] for r in ranks)}
    problem = ""
    writes = world.local_rank == 0
    mine = next((holders[r] for r in world.members[world.node] if holders[r]), None)
    with _noting() as problems:
        if writes:
            to.mkdir(parents=True)
            if mine is not None:  # the same state, maybe in other files
                for path in mine.iterdir():
                    os.link(path, to / path.name)
    if len(with_it) < world.nodes:
        files = sorted(source.iterdir()) if world.rank == root else []
        sizes = world.broadcast([(path.name, path.stat().st_size) for path in files], root)
        for file, size in sizes:
            for begin in range(0, size, PIECE_BYTES):
                piece = _piece(source / file, begin) if world.rank == root else b""
                piece = world.broadcast(piece, root)
                if writes and mine is None and not problems:
                    with _noting(problems), (to / file).open("ab") as out:
                        out.write(piece)
    problem = "; ".join(filter(None, world.gather("; ".join(problems))))
    if problem and writes:
        shutil.rmtree(to, ignore_errors=True)
    return problem or None


def _piece(path: Path, begin: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(PIECE_BYTES)


@contextmanager
def _noting(problems: list[str] | None = None) -> Iterator[list[str]]:
    """Note errors of the file system, which the ranks tell each other later."""
    problems = [] if problems is None else problems
    try:
        yield problems
    except OSError as error:
        problems.append(str(error))
