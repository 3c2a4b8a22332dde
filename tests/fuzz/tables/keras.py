"""Valid arguments of mpidl.keras, on the backend that KERAS_BACKEND names: on one rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.fuzz.tables.training import FOLDER

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("KERAS_HOME", str(FOLDER / "keras"))

import keras
import numpy as np

import mpidl
import mpidl.keras as hvd
from tests.fuzz.calls import Given, given, on

mpidl.init(abort_on_error=False)


def network() -> Any:
    made = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    made.compile(keras.optimizers.SGD(0.1), "mse")
    return made


MODEL = network()
HOSTILE: dict[str, Callable[[], Any]] = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "keras.optimizers.SGD": lambda: keras.optimizers.SGD,
    "DistributedOptimizer": lambda: hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)),
    "model": lambda: MODEL,
    "Variable": lambda: keras.Variable(np.ones(2, "f")),
    "convert_to_tensor": lambda: keras.ops.convert_to_tensor(np.ones((2, 3), "f")),
    "KerasTensor": lambda: keras.KerasTensor((2, 3)),
    "Callback": keras.callbacks.Callback,
}


def at_work(callback: Any) -> Any:
    callback.set_model(MODEL)
    callback.set_params({"steps": 3})
    return callback


def applied(made: Any) -> None:
    """Let an optimizer, if it is one, average a gradient."""
    v = keras.Variable(np.ones(2, "f"))
    made.build([v])
    made.apply([keras.ops.convert_to_tensor(np.ones(2, "f"))], [v])


def warmed(made: Any) -> None:
    made.on_train_begin()
    made.on_epoch_begin(0)
    made.on_train_batch_begin(0)


def stored() -> Any:
    path = FOLDER / "model.keras"
    if not path.exists():
        MODEL.save(path)
    return path


TABLE: dict[str, Callable[[], Given]] = {
    "keras.callbacks:BroadcastGlobalVariablesCallback": lambda: given(0)._replace(
        then=lambda made: at_work(made).on_train_begin()
    ),
    "keras.callbacks:BroadcastGlobalVariablesCallback.on_train_begin": lambda: on(
        at_work(hvd.BroadcastGlobalVariablesCallback(0)), {}
    ),
    "keras.callbacks:LearningRateWarmupCallback": lambda: given(0.1, 5, 3, 1)._replace(
        then=lambda made: warmed(at_work(made))
    ),
    "keras.callbacks:MetricAverageCallback.on_epoch_end": lambda: on(
        at_work(hvd.MetricAverageCallback()), 0, {"loss": 1.0}
    ),
    "keras.callbacks:on_rank_0": lambda: given(keras.callbacks.Callback()),
    "keras.optimizer:DistributedOptimizer": lambda: given(
        keras.optimizers.SGD(0.1), weight=2.0
    )._replace(then=applied),
    "keras.optimizer:load_model": lambda: given(stored(), weight=2.0, compile=True)._replace(
        theirs=(0, "compile")
    ),
}
