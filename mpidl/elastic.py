"""Training that goes on when ranks are killed, with those that are left.

Needs User-Level Failure Mitigation (ULFM; MPI Forum's chapter on process fault tolerance), which
`mpidl run --elastic` asks Open MPI for. A rank's death ends every collective call that waits for it
with an error. Whoever gets one revokes all communicators, so that all others get one, too; then all
that are left agree, shrink the world, build the replica anew, and go on from the newest snapshot.

Snapshots are checkpoints in memory: each node keeps the whole state in a folder under /dev/shm,
which outlives the rank that wrote a part of it, and the whole job too where `mpidl run --restarts`
starts it again (`mpidl.warm`). A step counts once for all ranks or not at all:
all go back to the same snapshot, and make the steps after it again.
"""

from __future__ import annotations

import os
import shutil
import time
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mpidl import abort, config, data, replacement, spawned, survivable, warm, watchdog, world
from mpidl.checkpoint.folder import complete
from mpidl.checkpoint.saver import Saver
from mpidl.errors import MpidlError
from mpidl.making import known
from mpidl.warm import MEMORY, PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpidl.checkpoint import Checkpoints
    from mpidl.data import Dataset
    from mpidl.trainer import Trainer
    from mpidl.world import World

    T = TypeVar("T")

KNOWN_SECONDS = 0.5  # until then a rank's death has become known to the others
SNAPSHOT_SECONDS = 0.2  # between snapshots: at most so much is done again
LEFT_SECONDS = 24 * 3600.0  # a folder that nobody has written to for so long is nobody's

_retired: list[Any] = []  # communicators, of `_retire`


class RankDied(MpidlError):
    """A rank has died; raised on all others."""


class Elastic:
    """Lets `trainer.fit` survive the death of ranks. Collective.

    Raises InvalidArgument on every rank where that cannot be: without ULFM, with options whose
    state dies with a rank, and where a node has no /dev/shm.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.recoveries = 0  #: so far
        replica, ranks = trainer.replica, trainer.world
        with ranks.together():
            survivable.check(trainer)
            config.min_ranks()
        self.folder: Path | None = None
        self._writing: list[Checkpoints] = []  # the last one is at work
        self._before = 0  # epochs done by earlier calls of `fit`
        self.replacements = replacement.of(ranks)
        if spawned.parent is not None:  # it joins the others in `run`
            return
        self.folder = MEMORY / f"{PREFIX}{warm.name(ranks)}-{ranks.node}"
        survivable.check_owned(trainer)
        self._keep()
        if ranks.local_rank == 0:
            _sweep()
        snapshot = warm.bring(ranks, self.folder, replica.steps)
        trainer.memory = self._saver(resume=snapshot or False)
        if snapshot is None:
            trainer.memory.begin(trainer.done.position)

    def run(self, train: Dataset | data.Loader, fit: Callable[[], T]) -> T:
        """Call `fit` until it ends without a rank's death. Collective."""
        self._before, self.trainer.begins = self.trainer.epochs, True
        news = self.replacements
        lost = news is not None and spawned.parent is not None
        if news is not None and lost:
            done = replacement.wait(len(news.results))
            if done is not None:
                news.results.append(done)
                return done  # type: ignore[return-value]
        while True:
            try:
                if lost:
                    self._recover()
                    if isinstance(train, data.Loader):
                        train.world = self.trainer.world
                lost = False
                result = fit()
                self.check()
                if news is not None:
                    news.results.append(result)  # type: ignore[arg-type]
                return result
            except Exception as error:  # noqa: PERF203  # a `fit`, not a step
                lost = True
                if isinstance(error, RankDied):
                    continue
                if not died(self.trainer.world, error):
                    if self.trainer._folder is not None:
                        self.trainer._folder.fail()
                    raise
                agreed(self.trainer.world, well=False)

    def check(self) -> None:
        """Raise RankDied on all ranks that are left where any has died. Collective.

        Unlike other calls, which may return garbage on some ranks when one has died, and an error
        on others: so all that is to last, the end of `fit` and snapshots, stands behind this one.
        """
        if not agreed(self.trainer.world, well=True):
            raise RankDied("another rank has died")

    def _recover(self) -> None:
        """Go back to the newest snapshot that all nodes have, with the ranks that there are."""
        trainer, news = self.trainer, self.replacements
        joins = spawned.parent is not None or (news is not None and news.joining is not None)
        for saver in (trainer.memory, trainer.saver):
            if saver is not None:
                saver.checkpoints.abandon()
        trainer.replica.close()
        trainer.world = ranks = replacement.grown(self) if joins else shrunk(trainer.world)
        self.recoveries += not joins
        if news is None and ranks.size < config.min_ranks():
            ranks.agree(MpidlError(replacement.too_few(ranks.size, config.min_ranks())))
        assert self.folder is not None
        names = [path.name for path in complete(self.folder)]
        common = set.intersection(*map(set, ranks.gather(names)))
        newest = next((name for name in names if name in common), None)
        if newest is None:
            failed = "another rank has failed" if not self.folder.exists() else None
            problem = failed or "a rank died before the first snapshot was complete"
            ranks.agree(MpidlError(problem))
        assert newest is not None
        if ranks.local_rank == 0:  # newer ones, of other nodes' ranks that died
            for name in names[: names.index(newest)]:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        ranks.barrier()
        trainer.replicate()
        trainer.memory = self._saver(resume=self.folder / newest)
        trainer.begins = False  # on all: the death may have come when some had begun
        trainer.done.left -= self._before
        steps, s = trainer.replica.steps, "s" * (ranks.size > 1)
        what = "a new rank has joined" if joins else "ranks were lost"
        trainer.done.told = f"{what}: {ranks.size} rank{s} go on from update {steps}"
        if trainer.saver is not None:
            trainer.saver = trainer.saver.again()
        if news is not None:
            news.look(ranks)

    def _grow(self) -> None:
        """Let a new rank join if one is ready, after a snapshot. Collective."""
        news, trainer = self.replacements, self.trainer
        assert news is not None
        ready = news.poll(trainer.world)
        if ready is None:
            return
        for saver in trainer._savers:  # its snapshot is what all go on from
            saver.checkpoints.finish()
        self.check()
        news.joining = ready
        raise RankDied("none has: another one is to join")

    def shared(self) -> dict[str, Any]:
        """Return what a new rank has to know."""
        trainer, news = self.trainer, self.replacements
        folder = trainer._folder
        return {
            "before": self._before,
            "begins": trainer.begins,
            "recoveries": self.recoveries,
            "results": [] if news is None else news.results,
            "out": None if folder is None else folder.path,
        }

    def take(self, folder: Path, told: dict[str, Any]) -> None:
        """Take over what `shared` returned on another rank."""
        trainer = self.trainer
        self.folder, self._before, trainer.begins = folder, told["before"], told["begins"]
        self.recoveries = told["recoveries"]
        if told["out"] is not None:
            from mpidl.run_folder import RunFolder  # as in `Trainer`

            trainer._folder = RunFolder.opened(told["out"])
        self._keep()

    def _keep(self) -> None:
        """See that the folder of snapshots is removed at the end."""
        assert self.folder is not None
        self._end = weakref.finalize(self, _remove, self.folder, self._writing, os.getpid())
        abort.before(self._end if config.run_id() is None else self._abandon)

    def _saver(self, resume: Path | bool) -> Saver:
        assert self.folder is not None
        made = Saver(
            self.trainer,
            self.folder,
            timedelta(seconds=SNAPSHOT_SECONDS),
            2,
            None,
            resume,
            world=self.trainer.world.on_node(),
            check=self.check,
            after=None if self.replacements is None else self._grow,
        )
        self._writing[:] = [made.checkpoints]
        return made

    def _abandon(self) -> None:
        for checkpoints in self._writing:
            checkpoints.abandon()

    def close(self) -> None:
        """Remove the snapshots of this node. Not collective: others may have died since `fit`."""
        if self.folder is not None:
            self._end()


def died(ranks: World, error: BaseException) -> bool:
    """Tell whether an error may come of a rank's death, which may come to be known later only."""
    MPI = ranks.MPI
    if not config.fault_tolerant() or (isinstance(error, MpidlError) and not error.collective):
        return False
    known = MPI.ERR_PROC_FAILED, MPI.ERR_REVOKED
    if isinstance(error, MPI.Exception) and error.Get_error_class() in known:
        return True
    until = time.monotonic() + KNOWN_SECONDS
    while time.monotonic() < until:
        try:
            ranks.comm.Iprobe()  # lets news arrive
        except MPI.Exception:
            return True
        ranks.comm.Ack_failed()
        if ranks.comm.Is_revoked() or ranks.comm.Get_failed().size:
            return True
        time.sleep(1e-3)
    return False


def agreed(ranks: World, *, well: bool) -> bool:
    """Return whether all ranks are well, the same on all. Collective, also where calls fail.

    Whoever is not ends all calls in which others wait, so that they come here, too.
    """
    if not config.fault_tolerant():
        return well
    if not well:
        world.revoke(ranks)
    try:
        return bool(ranks.comm.Agree(int(well)))
    except ranks.MPI.Exception:  # on all of them
        return False


def shrunk(ranks: World) -> World:
    """Return the world of the ranks that are left. Collective among them.

    It takes the place of `mpidl.init()`'s, and of the communicator that errors end. Where another
    one dies meanwhile, some have made a world and others have not: then all make a smaller one.
    """
    comm, shrunken = ranks.comm, list[Any]()
    world.revoke(ranks)
    for _ in range(ranks.size):  # not for ever, where it is no death
        old, comm, left = comm, comm.Shrink(), None
        with suppress(ranks.MPI.Exception):
            old.Agree(1)  # all have made it: see `making`
        shrunken.append(comm)
        try:
            left = world.World.of(ranks.MPI, comm, node=ranks.node)
            watchdog.again(left)
        except Exception:  # which need not be MPI's: see `Elastic.check`
            left = None
            comm.Revoke()
            world.revoke(ranks)
        with suppress(ranks.MPI.Exception):  # on all of them
            if comm.Agree(int(left is not None)) and left is not None:
                world.replace_current(left)
                abort.end_without_finalizing(left.comm)
                _retire(shrunken)
                return left
        comm.Revoke()
    raise MpidlError("ranks have died, and those that are left come to no world of their own")


def _retire(comms: list[Any]) -> None:
    """Give back `comms`, and all that were revoked, at the next call: later nothing is under way.

    MPI_Comm_free is not collective here: in Open MPI it waits for nobody.
    """
    for comm in _retired:
        with suppress(Exception):  # it may be freed already
            comm.Free()
    revoked = [comm for comm in known() if comm and comm.Is_revoked()]
    _retired[:] = comms + [comm for comm in revoked if comm not in comms]


def _sweep() -> None:
    """Remove what jobs left whose ranks were all killed: a living one writes all the time."""
    for folder in MEMORY.glob(f"{PREFIX}*"):
        with suppress(OSError):
            state = folder.stat()
            if state.st_uid == os.getuid() and time.time() - state.st_mtime > LEFT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, writing: list[Checkpoints], process: int) -> None:
    if os.getpid() != process:
        return
    for checkpoints in writing:  # what is written later would stay
        checkpoints.abandon()
    if config.run_id() is None or not abort.failing():  # the next attempt goes on from it
        shutil.rmtree(folder, ignore_errors=True)
