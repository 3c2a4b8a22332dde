"""`Trainer`: the training loop."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import codecs, data, nn, progress
from mpidl.array import is_device
from mpidl.errors import InvalidArgument, NonFinite
from mpidl.nn.predict import evaluating
from mpidl.parallel import DataParallel
from mpidl.world import World, current

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mpidl.array import Array
    from mpidl.autograd import Tensor
    from mpidl.data import Dataset
    from mpidl.optim.groups import Groups
    from mpidl.run_folder import RunFolder
    from mpidl.strategies import Strategy

    Loss = Callable[[Tensor, Array], Tensor]
    Metric = Callable[[Tensor, Array], float | Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; the same on every rank."""

    epoch: int  #: from 1
    steps: int  #: since the trainer was made
    loss: float  #: of training: mean over the samples, each taken before its own update
    metrics: dict[str, float]  #: of the samples given as `evaluate`; "loss" among them
    seconds: float  #: spent in training steps, on the slowest rank
    samples_per_second: float  #: of all ranks together


class Trainer:
    """Fits `model` to data, on all ranks of the world.

    Takes the arguments of `DataParallel`, and those below. With `accumulate` = k an update follows
    on k batches; the last update of an epoch on those that are left.

    Args:
        loss: function (output, target) -> mean over the samples, as a tensor of one element.
        metrics: name -> function (output, target) -> mean over the samples, as a number or a
            tensor of one element. By default accuracy where the loss is `nn.cross_entropy`, else
            none. "loss" is there already: InvalidArgument on every rank.
        out: folder for `config.json` and `metrics.jsonl`, written by rank 0, whose word counts.
        settings: what else `config.json` is to hold.
        quiet: show no progress.
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
        audit_every: int = 1000,
        out: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.world = world or current()
        self.model, self.loss = model, loss
        if metrics is None:
            metrics = {"accuracy": nn.accuracy} if loss is nn.cross_entropy else {}
        self.metrics = dict(metrics)
        with self.world.together():
            if "loss" in self.metrics:
                raise InvalidArgument('metrics: "loss" is the loss itself: choose another name')
        self.replica = DataParallel(
            model,
            optimizer,
            strategy,
            world=self.world,
            local_steps=local_steps,
            codec=codec,
            overlap=overlap,
            bucket_bytes=bucket_bytes,
            check_finite=check_finite,
            clip_norm=clip_norm,
            clip_value=clip_value,
            accumulate=accumulate,
            audit_every=audit_every,
        )
        self.device = "cuda" if is_device(self.replica.buckets[0].param) else "cpu"
        self.out, self.settings, self.quiet = out, dict(settings or {}), quiet
        self.epochs = 0  #: done so far, in all calls of `fit`
        self._folder: RunFolder | None = None

    def fit(
        self,
        train: Dataset | data.Loader,
        epochs: int,
        batch_size: int | Callable[[int], int] | None = None,
        *,
        evaluate: Dataset | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> list[Epoch]:
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
        with self.world.together():
            if epochs < 0:
                raise InvalidArgument(f"epochs={epochs}: expected 0 or more")
            if (batch_size is None) != isinstance(train, data.Loader):
                raise InvalidArgument(f"{batch_size=}: expected for a data set, not for a Loader")
        self.world.same(f"{epochs=}, evaluate={evaluate is not None}", "fit")

        def batches(epoch: int) -> data.Batches:
            if isinstance(train, data.Loader):
                return train.epoch(epoch, device=self.device)
            assert batch_size is not None
            return data.batches(
                train,
                batch_size(epoch) if callable(batch_size) else batch_size,
                world=self.world,
                seed=seed,
                epoch=epoch,
                shuffle=shuffle,
                device=self.device,
            )

        # all of them now: what is wrong with the last is told at once
        ahead = [batches(epoch) for epoch in range(self.epochs, self.epochs + epochs)]
        steps = sum(map(len, ahead))
        first = ahead[0] if ahead else batches(0)
        samples = len(first.dataset)
        if not callable(batch_size):
            batch_size = first.batch_size
        folder = self._open_folder(samples, epochs=epochs, batch_size=batch_size, seed=first.seed)
        history: list[Epoch] = []
        with progress.make(steps, shown=self.world.rank == 0 and not self.quiet) as shown:
            if not self.epochs:
                shown.line(self._introduction())
            for this in ahead:
                loss, seconds = self._train(this, shown)
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
                shown.line(_line(result, self.epochs - len(history) + epochs))
                if folder is not None:
                    folder.write(asdict(result))
        return history

    def evaluate(self, dataset: Dataset, batch_size: int = 1024) -> dict[str, float]:
        """Return "loss" and the metrics, means over `dataset`, on every rank. Collective.

        Raises InvalidArgument for an empty data set.
        """
        with self.world.together():
            if len(dataset) == 0:
                raise InvalidArgument("evaluate: the data set is empty")
        functions: dict[str, Metric] = {"loss": self.loss, **self.metrics}
        totals = [0.0] * len(functions)
        batches = data.batches(
            dataset,
            min(batch_size, len(dataset)),
            world=self.world,
            shuffle=False,
            device=self.device,
        )
        with evaluating(self.model):
            for x, y in batches:
                if len(x) == 0:  # other ranks have samples; a mean over none may be NaN
                    continue
                output = self.model(x)
                for i, function in enumerate(functions.values()):
                    totals[i] += float(function(output, y)) * len(x)
        means = self.world.sum(totals) / len(dataset)
        return dict(zip(functions, map(float, means), strict=True))

    def _train(self, batches: data.Batches, shown: progress.Progress) -> tuple[float, float]:
        """Make the steps of one epoch. Returns the mean loss, and the slowest rank's seconds."""
        total: Any = 0.0  # on a GPU it stays there: no step waits for it
        spoiled: int | None = None  # the first step whose loss was not finite, where that is known
        left = len(batches.dataset)
        self.model.train()
        joins = any(module.sync for module in self.model.modules())
        start = time.perf_counter()
        for step, (x, y) in enumerate(batches):
            whole = min(left, batches.batch_size)
            place = whole * self.world.rank // self.world.size
            nn.random.reseed(batches.seed, batches.epoch, step, place)
            if len(x) or joins:
                loss = self.loss(self.model(x), y)
                loss.backward()
            if len(x):
                total = total + loss.data.reshape(()).astype(np.float64) * len(x)
                if spoiled is None and self.device == "cpu" and not math.isfinite(total):
                    spoiled = step
            self.replica.step(weight=len(x))
            shown.step(whole)
            left -= whole
        self.replica.flush()
        self.replica.synchronize()
        self.replica.average_buffers()
        loss_sum = float(total)
        seconds = max(self.world.gather(time.perf_counter() - start))
        loss_sum_of_all = float(self.world.sum([loss_sum])[0])
        if not math.isfinite(loss_sum_of_all):
            self._tell_loss(loss_sum, spoiled, batches)
        return loss_sum_of_all / len(batches.dataset), seconds

    def _tell_loss(self, loss_sum: float, step: int | None, batches: data.Batches) -> None:
        """Raise NonFinite on every rank, with the parameter if one is no number. Collective."""
        self.replica.audit.look(self.replica.steps)
        since = "" if step is None else f", from step {step} of {len(batches)} on"
        problem = NonFinite(f"epoch {batches.epoch + 1}: the loss is {loss_sum}{since}")
        self.world.agree(None if math.isfinite(loss_sum) else problem)

    def close(self) -> None:
        """Give back what the strategy took. The model stays usable. Not collective."""
        self.replica.close()

    def _introduction(self) -> str:
        world, choice = self.world, self.replica.choice
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        nodes = f"{world.nodes} node{'s' * (world.nodes > 1)}"
        coded = f", codec {choice.codec}" if choice.codec is not None else ""
        return f"{ranks} on {nodes}, strategy {choice.name} ({choice.why}){coded}"

    def _open_folder(self, samples: int, **arguments: Any) -> RunFolder | None:
        """Return the run folder, made at the first call, if rank 0 wants one. Collective."""
        out = self.world.broadcast(self.out)
        if out is None or self._folder is not None:
            return self._folder
        from mpidl.run_folder import RunFolder  # its imports are slow, and few runs need them

        asked = {
            "strategy": self.replica.choice.name,
            "codec": None if self.replica.choice.codec is None else str(self.replica.choice.codec),
            "optimizer": self.replica.optimizer,
            "device": self.device,
            "samples": samples,
            **arguments,
        }
        self._folder = RunFolder(out, self.world, {**asked, **self.settings})
        return self._folder


def _line(result: Epoch, epochs: int) -> str:
    metrics = "".join(f", test {name} {value:.4f}" for name, value in result.metrics.items())
    rate = f"{result.samples_per_second:,.0f} samples/s"
    number = f"{result.epoch:{len(str(epochs))}} of {epochs}"
    return f"epoch {number}: loss {result.loss:.4f}{metrics}, {rate}"
