"""`Trainer`: the training loop."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from mpidl import clock, codecs, config, data, job_folder, nn, progress, replacement, signals
from mpidl.array import is_device
from mpidl.data.batches import size_in
from mpidl.done import Done
from mpidl.errors import InvalidArgument
from mpidl.evaluation import batch_of, mean_of, means, tell_loss
from mpidl.history import Epoch, History
from mpidl.loss_sum import LossSum
from mpidl.meter import Meter
from mpidl.parallel import DataParallel
from mpidl.refuse import whole
from mpidl.tensorboard import TensorBoard
from mpidl.times import Lap, Lapped, Totals
from mpidl.world import World, current

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import timedelta
    from pathlib import Path

    from mpidl.array import Array
    from mpidl.autograd import Tensor
    from mpidl.checkpoint.saver import Saver
    from mpidl.data import Dataset
    from mpidl.elastic import Elastic
    from mpidl.optim.groups import Groups
    from mpidl.run_folder import RunFolder
    from mpidl.strategies import Strategy

    Loss = Callable[[Tensor, Array], Tensor]
    Metric = Callable[[Tensor, Array], float | Tensor]


class Trainer:
    """Fits `model` to data, on all ranks of the world.

    Takes the arguments of `DataParallel`, and those below. With `accumulate` = k an update follows
    on k batches; the last update of an epoch on those that are left. With `microbatches` losses,
    metrics and weights are the same bits on any number of ranks, where each has as many threads for
    linear algebra (OMP_NUM_THREADS).

    Args:
        loss: function (output, target) -> mean over the samples, as a tensor of one element.
        metrics: name -> function (output, target) -> mean over the samples, as a number or a
            tensor of one element. By default accuracy where the loss is `nn.cross_entropy`, else
            none. "loss" is there already: InvalidArgument on every rank.
        checkpoint: folder for checkpoints, on a file system that all hosts share: `fit` writes one
            after every epoch, while training goes on. SIGTERM and SIGUSR1 then finish the step,
            write one, and end the run with status 75. See `mpidl.checkpoint`.
        checkpoint_every: also every so many updates, or so much time (a `datetime.timedelta`).
        keep, best: the last so many are kept, and the best: "loss" for that with the smallest,
            ("accuracy", "max") for the largest; of `Epoch.metrics`, else `Epoch.loss`.
        resume: "auto" goes on from the newest complete one in `checkpoint`, if any, with a warning
            for a damaged one: `fit` then returns also what was done before. True if there must be
            one, or a path; False begins anew.
        out: folder for what docs/run_folder.md tells of; rank 0 writes, and its word
            counts. In a job MPIDL_OUT is the default of this and `checkpoint`: `job_folder`.
        settings: what else `config.json` is to hold.
        quiet: show no progress, and no summary of where the time went. By default MPIDL_QUIET.
        tensorboard: write events to OUT/tensorboard too, by tensorboardX; `trainer.tensorboard`
            takes images and the like of your own, on every rank: `mpidl.tensorboard.TensorBoard`.
        elastic: go on when ranks are killed, with others as `world` and `replica`: `mpidl.elastic`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Groups,
        strategy: str | Strategy = "auto",
        *,
        world: World | None = None,
        local_steps: int = 1,
        codec: codecs.Spec = None,
        overlap: bool | str = "auto",
        bucket_bytes: int | str = "auto",
        metrics: Mapping[str, Metric] | None = None,
        check_finite: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        microbatches: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | timedelta | None = None,
        keep: int = 3,
        best: str | tuple[str, str] | None = None,
        resume: str | Path | bool = "auto",
        precision: str | None = None,
        audit_every: int = 1000,
        noise_every: int = 20,
        out: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        quiet: bool | None = None,
        tensorboard: bool = False,
        elastic: bool = False,
    ) -> None:
        self.world = replacement.own(world or current())
        self.model, self.loss = model, loss
        usual = {"accuracy": nn.accuracy} if loss is nn.cross_entropy else {}
        with self.world.together():
            self.metrics = dict(usual if metrics is None else metrics)
            self.settings, elastic = dict(settings or {}), bool(elastic)
            self.quiet = config.quiet() if quiet is None else bool(quiet)
            if "loss" in self.metrics:
                raise InvalidArgument('metrics: "loss" is the loss itself: choose another name')
        self.options: dict[str, Any] = {
            "strategy": strategy,
            "local_steps": local_steps,
            "codec": codec,
            "overlap": overlap,
            "bucket_bytes": bucket_bytes,
            "check_finite": check_finite,
            "clip_norm": clip_norm,
            "clip_value": clip_value,
            "accumulate": accumulate,
            "microbatches": microbatches,
            "precision": precision,
            "audit_every": audit_every,
            "noise_every": noise_every,
        }  #: of `DataParallel`
        self.optimizer, self.microbatches = optimizer, microbatches
        self.replicate()
        self.device = "cuda" if is_device(self.replica.buckets[0].param) else "cpu"
        self.out, checkpoint = job_folder.defaults(self.world, out, checkpoint)
        self.epochs = 0  #: epochs done so far, in all calls of `fit`
        self._folder: RunFolder | None = None
        self._totals = Totals()
        self.done, self.losses = Done(), LossSum()  #: before this epoch; of its steps, so far
        self.saver: Saver | None = None
        self.memory: Saver | None = None  #: of snapshots, with `elastic`
        self.begins = False  #: whether `memory` has none of this `fit`
        self.tensorboard = TensorBoard(self, tensorboard)
        if checkpoint is not None:
            from mpidl.checkpoint.saver import Saver  # its imports are slow, and few runs need them

            self.saver = Saver(self, checkpoint, checkpoint_every, keep, best, resume)
        self._elastic: Elastic | None = None
        if elastic:
            from mpidl.elastic import Elastic

            self._elastic = Elastic(self)

    def replicate(self) -> None:
        """Make the replica, for the world as it is now. Collective."""
        self.replica = DataParallel(self.model, self.optimizer, world=self.world, **self.options)

    def fit(
        self,
        train: Dataset | data.Loader,
        epochs: int,
        batch_size: int | Callable[[int], int] | None = None,
        *,
        evaluate: Dataset | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> History:
        """Train for `epochs` epochs with global batches of `batch_size` samples. Collective.

        `batch_size` may be a function of the epoch, from 0 on, such as `schedules.growing_batch`.
        A `data.Loader` has its own batch size, seed and shuffling. The order of the samples and
        the noise of layers (dropout) depend on (seed, epoch, step) and the place in the batch.
        Returns one `Epoch` each. `evaluate` is measured after every epoch. A second call goes on
        where the first ended. Raises on every rank InvalidArgument for epochs below 0 or a batch
        size that is missing, RankMismatch where the ranks differ in what they pass, NonFinite at
        the end of an epoch whose loss, or a parameter, is NaN or infinity, and what
        `data.batches` and `DataParallel.step` raise.
        """
        if self._elastic is not None:
            fit = partial(self._fit, train, epochs, batch_size, evaluate, seed, shuffle)
            return self._elastic.run(train, fit)
        return self._fit(train, epochs, batch_size, evaluate, seed, shuffle)

    def _fit(
        self,
        train: Dataset | data.Loader,
        epochs: int,
        batch_size: int | Callable[[int], int] | None,
        evaluate: Dataset | None,
        seed: int,
        shuffle: bool,
    ) -> History:
        """Do what `fit` is asked for, as far as it is not done. Collective."""
        clock.take_thread()
        with self.world.together():
            whole("epochs", epochs)
            if isinstance(train, data.Loader) and train.microbatches != self.microbatches:
                raise InvalidArgument(
                    f"a Loader of microbatches={train.microbatches}, and a Trainer of "
                    f"microbatches={self.options['microbatches']}: expected the same"
                )
            if (batch_size is None) != isinstance(train, data.Loader):
                raise InvalidArgument(f"{batch_size=}: expected for a data set, not for a Loader")
        self.world.same(f"{epochs=}, evaluate={evaluate is not None}", "fit")

        def batches(epoch: int) -> data.Batches:
            if isinstance(train, data.Loader):
                return train.epoch(epoch, device=self.device)
            return data.batches(
                train,
                size_in(epoch, batch_size),
                world=self.world,
                seed=seed,
                epoch=epoch,
                shuffle=shuffle,
                device=self.device,
                microbatches=self.microbatches,
            )

        history = History(Epoch(**done) for done in self.done.take(epochs))  # is not done again
        asked, epochs = epochs, epochs - len(history)
        # all of them now: what is wrong with the last is told at once
        ahead = [batches(epoch) for epoch in range(self.epochs, self.epochs + epochs)]
        first = ahead[0] if ahead else batches(0)
        samples = len(first.dataset)
        batch_size = batch_size if callable(batch_size) else first.batch_size
        folder = self._open_folder(samples, epochs=epochs, batch_size=batch_size, seed=first.seed)
        made = self.done.position.get("batch", 0)  # by an earlier run
        meter = Meter(sum(map(len, ahead)) - made, lambda: self.losses)
        shown = progress.make(meter, shown=self.world.rank == 0 and not self.quiet)
        if folder is not None:
            shown = folder.follow(shown, self, ahead, meter)
            folder.listeners = self.tensorboard.follow()
        with shown, signals.watching() if self.saver is not None else nullcontext():
            if not self.epochs or self.done.told:
                shown.line(progress.introduction(self.world, self.replica.choice, self.done))
            for this in ahead:
                begun = self.replica.steps
                loss, lapped = self._train(this, shown)
                seconds = max(lapped.seconds)
                self._totals.add(lapped, self.replica.steps - begun)
                metrics = {} if evaluate is None else self.evaluate(evaluate, this.batch_size)
                self.epochs += 1
                result = Epoch(
                    epoch=self.epochs,
                    steps=self.replica.steps,
                    loss=loss,
                    metrics=metrics,
                    seconds=seconds,
                    samples_per_second=samples / seconds,
                )
                history.append(result)
                shown.line(progress.line(result, self.epochs - len(history) + asked))
                if folder is not None:
                    folder.write_epoch(result, lapped, begun, self.replica.noise.record())
                self.done.history.append(asdict(result))
                for saver in self._savers:
                    saver.after_epoch(result)
            if self.saver is not None:
                self.saver.checkpoints.finish()
            if ahead and self.world.rank == 0:
                from mpidl import summary

                summary.tell(self._totals, self.replica, self._folder, shown)
        return history

    def evaluate(self, dataset: Dataset, batch_size: int = 1024) -> dict[str, float]:
        """Return "loss" and the metrics, means over `dataset`, on every rank. Collective.

        Raises InvalidArgument for an empty data set.
        """
        with self.world.together():
            batch_size = batch_of(dataset, batch_size)
        batches = data.batches(
            dataset,
            batch_size,
            world=self.world,
            shuffle=False,
            device=self.device,
            microbatches=self.microbatches,
        )
        return means(self.world, self.model, {"loss": self.loss, **self.metrics}, batches)

    def _train(self, batches: data.Batches, shown: progress.Progress) -> tuple[float, Lapped]:
        """Make the steps of one epoch. Returns the mean loss, and where the time went."""
        if self.memory is not None and self.begins:  # weights may be others than before
            self.memory.begin(self.done.position)
            self.begins = False
        batches, before, spent = self.done.begin(batches)
        self.losses = losses = LossSum(before if self.world.rank == 0 else ())
        self.model.train()
        joins = any(module.sync for module in self.model.modules())
        start = time.perf_counter() - spent
        lap = Lap(self.world, columns=self._folder is not None)
        clock.switch(clock.COMPUTE)
        for shard, (x, y) in zip(batches.shards(), batches, strict=True):
            nn.random.reseed(batches.seed, batches.epoch, shard.step, shard.first)
            if self.replica.microbatches is not None:
                self.replica.microbatches.expect(shard.batch_size)
            if len(x) or joins:
                loss = self.loss(self.model(x), y)
                loss.backward()
            if len(x):
                losses.add(loss.data, len(x), shard.step)
            self.replica.step(weight=len(x))
            if not shard.last:
                continue
            clock.switch(clock.OTHER)
            shown.step(shard.batch_size)
            for saver in self._savers:
                saver.after_step(batches, shard.step, losses, time.perf_counter() - start)
            clock.switch(clock.COMPUTE)
        self.replica.flush()
        self.replica.synchronize()
        self.replica.average_buffers()
        sums = losses.parts()
        clock.switch(clock.OTHER)
        lapped = lap.end(self.world, spent)
        mean = mean_of(self.world, sums, len(batches.dataset))
        if not math.isfinite(mean):
            tell_loss(self.replica, losses, batches)
        return mean, lapped

    def close(self) -> None:
        """Give back what the strategy took. The model stays usable.

        Collective where checkpoints are written, else not.
        """
        if self._elastic is not None:
            self._elastic.close()
        if self.saver is not None:
            self.saver.checkpoints.close()
        self.tensorboard.close()
        self.replica.close()

    @property
    def _savers(self) -> list[Saver]:
        return [saver for saver in (self.saver, self.memory) if saver is not None]

    def _open_folder(self, samples: int, **arguments: Any) -> RunFolder | None:
        """Return the run folder, made at the first call, if rank 0 wants one. Collective."""
        out = self.world.broadcast(self.out)
        if self._folder is not None:
            self._folder.writes = self.world.rank == 0  # which may be another one by now
        if out is None or self._folder is not None:
            return self._folder
        from mpidl import run_folder  # its imports are slow, and few runs need them

        self._folder = run_folder.of_trainer(out, self, {"samples": samples, **arguments})
        return self._folder
