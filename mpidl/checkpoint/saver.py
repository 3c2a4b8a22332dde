"""When a `Trainer` writes checkpoints, and how it goes on from one."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl import abort, checkpoint, config, exact, signals, spawned
from mpidl.checkpoint import manifest
from mpidl.checkpoint.folder import complete
from mpidl.checkpoint.state import EngineState
from mpidl.done import Done, place
from mpidl.errors import CheckpointError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl import data
    from mpidl.checkpoint.checkpoints import Best
    from mpidl.history import Epoch
    from mpidl.loss_sum import LossSum
    from mpidl.trainer import Trainer
    from mpidl.world import World

EARLY = 0.1  # of the time between checkpoints: where less is left, it is time
FIRST_LOOK = 8  # steps until the first look at the clock
SNAPSHOT_SHARE = 0.1  # of the time, at most, for snapshots in memory


class Saver:
    """Writes checkpoints of a `Trainer`: every so many steps or seconds, and after every epoch.

    `after_step` and `after_epoch` are all that the loop calls. What it is to do, it finds out
    without messages: numbers of steps are the same on all ranks, and where time decides, rank 0
    tells at which step it is to be asked again. With `world` these ranks, such as those of each
    node, write for themselves; and a signal is nothing to them. `check` is called before each
    checkpoint is begun, `after` after it, but for the first. A run that `mpidl run --restarts`
    started again goes on from its own newest checkpoint, also where `resume` says otherwise.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: str | Path,
        every: int | timedelta | None,
        keep: int,
        best: Best,
        resume: str | Path | bool,
        world: World | None = None,
        check: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        again: bool = False,
    ) -> None:
        self.trainer, self.world, self.every = trainer, trainer.world, every
        self._leaves, self._check, self._after = world is None, check, after
        self._least = every if world is not None and isinstance(every, timedelta) else None
        with self.world.together():
            _check(every, resume)
        if world is None:
            self.world.same(f"checkpoint_every={every}, {resume=}", "checkpoint")
        state = EngineState(trainer.replica, world)
        self.checkpoints = checkpoint.Checkpoints(state, folder, keep=keep, best=best)
        self._options = folder, every, keep, best
        self._saved_at = time.monotonic()
        if world is None and not again:
            resume = self.world.broadcast(self._of_this_run()) or resume
        if resume is not False and spawned.parent is None:  # it gets the others' state
            self._resume(state, self.checkpoints.folder if resume is True else Path(resume))
        self._begun = trainer.replica.steps  # when the last checkpoint was made
        self._look_step = self._begun + FIRST_LOOK  # when to look at the clock

    def again(self) -> Saver:
        """Return another one for what the trainer's world and replica are now. Collective.

        It writes the checkpoint of the last epoch where a rank's death kept this from doing so.
        """
        made = Saver(self.trainer, *self._options, resume=False, again=True)
        done, steps = self.trainer.done, self.trainer.replica.steps
        last = self.checkpoints.last
        written = last is not None and f"step-{steps:08}" in last.name
        ended = not done.position and bool(done.history) and done.history[-1]["steps"] == steps
        try:
            if self.trainer.world.broadcast(ended and not written):
                epoch = done.history[-1]
                made._save({}, {"loss": epoch["loss"], **epoch["metrics"]})
        except BaseException:
            made.checkpoints.abandon()
            raise
        return made

    def _of_this_run(self) -> Path | None:
        """Return the newest that an attempt of this run wrote, where it was started again."""
        if config.attempt() and self.world.rank == 0:
            for path in complete(self.checkpoints.folder):
                with suppress(CheckpointError):
                    if manifest.read(path).made_by.get("run") == config.run_id():
                        return path
        return None

    def _resume(self, state: EngineState, path: Path) -> None:
        if path == Path("auto"):
            path = self.checkpoints.folder
            if not self.world.broadcast(bool(complete(path))):
                return
        loaded = checkpoint.restore(state, path, fallback=True)
        made = loaded.manifest
        with self.world.together():
            position = _position(loaded)
            _check_history(loaded)
        within = f", step {position['batch']} of the next" if position else ""
        notes = "".join(f"; {note}" for note in loaded.notes)
        told = f"resumed from {loaded.path}: {made.epoch} epochs{within}{notes}"
        self.trainer.epochs = made.epoch
        self.trainer.done = Done(list(made.history), made.epoch, position, told)

    def begin(self, position: dict[str, Any]) -> None:
        """Write a checkpoint of what there is at first, and wait for it. Collective."""
        self._save(position, {})
        self.checkpoints.finish()

    def after_step(self, batches: data.Batches, step: int, losses: LossSum, seconds: float) -> None:
        """Write a checkpoint if it is time, or if a signal came: then leave. Collective then.

        `losses` are this rank's in this epoch, and `seconds` what it took so far.
        """
        replica = self.trainer.replica
        if replica._accumulation is not None and replica._accumulation.passes:
            return
        stop = self._leaves and replica.stop_requested and not replica._asynchronous
        if not stop and (step + 1 == len(batches) or not self._due()):
            return
        parts = exact.parts(chain(*self.world.gather(losses.parts())))
        at = {**place(batches), "batch": step + 1, "losses": parts, "seconds": seconds}
        self._save(at, {})
        if stop:
            self._leave()
        if self._after is not None:
            self._after()

    def after_epoch(self, result: Epoch) -> None:
        """Write a checkpoint; leave if a signal came. Collective."""
        self._save({}, {"loss": result.loss, **result.metrics})
        replica = self.trainer.replica
        stop = replica.stop_requested
        if replica._asynchronous:
            stop = self.world.sum([stop])[0] > 0
        if stop and self._leaves:
            self._leave()
        if self._after is not None:
            self._after()

    def _leave(self) -> None:
        self.checkpoints.close()
        if self.checkpoints.failed:  # to start again would end here once more
            abort.leave_together(config.EXIT_NOT_SAVED)
        signals.leave()

    def _save(self, position: dict[str, Any], metrics: dict[str, float]) -> None:
        trainer = self.trainer
        begin = time.monotonic()
        if self._check is not None:
            self._check()
        self.checkpoints.save(
            trainer.replica.steps,
            epoch=trainer.epochs,
            position=position,
            metrics=metrics,
            history=tuple(trainer.done.history),
            made_by=checkpoint.made_by(trainer.replica),
        )
        self._saved_at = time.monotonic()
        if self._least is not None:  # the larger the state, the longer between snapshots
            spent = self._saved_at - begin + self.checkpoints.seconds
            self.every = max(self._least, timedelta(seconds=spent / SNAPSHOT_SHARE))
        self._begun = trainer.replica.steps
        self._look_step = self._begun + FIRST_LOOK

    def _due(self) -> bool:
        """Return whether it is time. Collective where rank 0's clock is to be asked."""
        steps = self.trainer.replica.steps
        if not isinstance(self.every, timedelta):
            return self.every is not None and steps >= self._begun + self.every
        if steps < self._look_step:
            return False
        since = time.monotonic() - self._saved_at
        left = self.every.total_seconds() - since
        each = since / max(1, steps - self._begun)
        due = left < EARLY * self.every.total_seconds()
        ahead = 1 if due else max(1, int(min(left / max(each, 1e-9), 1e9)))
        due, ahead = self.world.broadcast((due, ahead))
        self._look_step = steps + ahead
        return due


def _check(every: Any, resume: Any) -> None:
    whole = isinstance(every, int) and not isinstance(every, bool) and every > 0
    timed = isinstance(every, timedelta) and every > timedelta()
    if every is not None and not whole and not timed:
        raise InvalidArgument(
            f"checkpoint_every={every!r}: expected a number of steps, a datetime.timedelta, or None"
        )
    if not isinstance(resume, (str, Path, bool)):
        raise InvalidArgument(f'{resume=}: expected "auto", True, False or a path')


def _position(loaded: checkpoint.Loaded) -> dict[str, Any]:
    """Return the position of a checkpoint. Raises CheckpointError where it cannot be one."""
    position = loaded.manifest.position
    names = ("epoch", "seed", "batch_size", "samples", "shuffle", "batch", "losses", "seconds")
    if not position:
        return {}
    losses: Any = position.get("losses")
    fits = set(position) == set(names) and isinstance(losses, list)
    fits = fits and all(type(x) in (int, float) for x in (*losses, position["seconds"]))
    if not fits or type(position["batch"]) is not int or position["batch"] < 0:
        raise CheckpointError(f"{loaded.path}: its position in the data is {position}")
    return {**position, "losses": list(map(float, losses))}


def _check_history(loaded: checkpoint.Loaded) -> None:
    """Raise CheckpointError unless there is one `Epoch` for each that was done."""
    from mpidl.history import Epoch

    made = loaded.manifest
    try:
        done = [Epoch(**result) for result in made.history]
    except TypeError as error:
        raise CheckpointError(f"{loaded.path}: its history: {error}") from error
    if len(done) != made.epoch:
        raise CheckpointError(
            f"{loaded.path} tells of {len(done)} epochs of {made.epoch}: expected one that "
            "Trainer(checkpoint=...) wrote; others are for checkpoint.load"
        )
