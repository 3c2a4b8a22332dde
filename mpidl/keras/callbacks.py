"""Callbacks for `fit` on several ranks; names as in horovod.keras.callbacks."""

# ruff: noqa: ARG002 - Keras says what its hooks are given

from __future__ import annotations

import math
from typing import Any

import keras

from mpidl import packed
from mpidl.errors import InvalidArgument
from mpidl.keras.gradients import as_numpy
from mpidl.refuse import is_real, told, whole
from mpidl.world import current


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Give all ranks rank `root_rank`'s weights and optimizer state when training starts.

    Collective. Random states of layers, such as of Dropout, stay each rank's own.
    """

    def __init__(self, root_rank: int = 0) -> None:
        super().__init__()
        self.root_rank = root_rank

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast. Raises RankMismatch on every rank where shapes or dtypes differ."""
        model = self.model
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        optimizer = model.optimizer.variables if model.optimizer is not None else []
        broadcast_variables([*model.weights, *optimizer], self.root_rank)


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Replace an epoch's losses and metrics by their mean over ranks. Collective.

    To stand before callbacks that read them, so that all ranks decide alike (EarlyStopping).
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average.

        Raises on every rank RankMismatch where they have other names, InvalidArgument for what is
        no dict of numbers.
        """
        logs = {} if logs is None else logs
        world = current()
        with world.together():
            if not isinstance(logs, dict):
                raise InvalidArgument(f"MetricAverageCallback: {told(logs)}: expected a dict")
            names = sorted(logs)
            values = [_number(name, logs[name]) for name in names]
        world.same_lines(["metrics", *names])
        means = world.sum(values) / world.size
        logs.update(zip(names, means.tolist(), strict=True))


class LearningRateWarmupCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Raise the learning rate from `initial_lr` / size to `initial_lr`, batch by batch.

    `initial_lr` is the rate for the batch of all ranks; with the batch as many times larger as
    there are ranks, it is usually that many times a single process's, which is where this starts
    from (Goyal et al. 2017, section 2.2). After `warmup_epochs` it leaves the rate alone. Where
    Keras does not tell the steps of an epoch, `steps_per_epoch` does. Not collective. Raises
    InvalidArgument for values that cannot be.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: float = 5,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        for given in (initial_lr, warmup_epochs):
            if not (is_real(given) and 0 < given < math.inf):
                raise InvalidArgument(
                    f"initial_lr={told(initial_lr)}, warmup_epochs={told(warmup_epochs)}: "
                    "expected numbers above 0"
                )
        if steps_per_epoch is not None:
            whole("steps_per_epoch", steps_per_epoch, 1)
        self.initial_lr, self.warmup_epochs = initial_lr, warmup_epochs
        self.steps_per_epoch, self.verbose = steps_per_epoch, verbose
        self.epoch, self.steps, self.done = 0, 1, False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find out how many steps an epoch has."""
        self.steps = self.steps_per_epoch or (self.params or {}).get("steps") or 0
        if not self.steps:
            raise InvalidArgument("LearningRateWarmupCallback: expected steps_per_epoch")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note which epoch it is."""
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the rate of this batch."""
        if self.done:
            return
        progress = (self.epoch + (batch + 1) / self.steps) / self.warmup_epochs
        self.done = progress >= 1
        size = current().size
        rate = self.initial_lr * (1 + min(progress, 1.0) * (size - 1)) / size
        self.model.optimizer.learning_rate = rate
        if self.done and self.verbose and current().rank == 0:
            print(f"learning rate {rate:g} reached in epoch {self.epoch + 1}")


def _number(name: str, value: Any) -> float:
    """Return a metric as Python's number. Raises InvalidArgument for what is none."""
    try:
        return float(value)
    except Exception as error:  # each library has its own
        raise InvalidArgument(f"metric {name!r}={told(value)}: expected a number") from error


def on_rank_0(callback: Any) -> Any:
    """Return `callback` on rank 0, and one that does nothing on the others. Not collective.

    For ModelCheckpoint, CSVLogger, TensorBoard. Not for what changes training.
    """
    return callback if current().rank == 0 else keras.callbacks.Callback()


def broadcast_variables(variables: list[Any], root_rank: int = 0) -> None:
    """Give all ranks rank `root_rank`'s values of Keras variables. Collective."""
    held = {f"variable {i}": as_numpy(v.value) for i, v in enumerate(variables)}
    values = packed.broadcast(held, root_rank, current())
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
