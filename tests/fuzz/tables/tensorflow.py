"""Valid arguments of mpidl.tensorflow: on one rank. Imported only where TensorFlow is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

import mpidl
import mpidl.tensorflow as hvd
from tests.fuzz.calls import Given, given, on

mpidl.init(abort_on_error=False)

HOSTILE: dict[str, Callable[[], Any]] = {
    "tf ()": lambda: tf.ones(()),
    "tf (0, 3)": lambda: tf.ones((0, 3)),
    "tf (2, 3)": lambda: tf.ones((2, 3)),
    "tf int": lambda: tf.ones(3, tf.int32),
    "tf complex": lambda: tf.ones(3, tf.complex64),
    "tf string": lambda: tf.constant(["a"]),
    "tf ragged": lambda: tf.ragged.constant([[1.0], [2.0, 3.0]]),
    "tf sparse": lambda: tf.sparse.from_dense([[1.0, 0.0]]),
    "tf slices": lambda: tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]), tf.constant([3, 2])),
    "variable": lambda: tf.Variable(tf.ones(2)),
    "spec": lambda: tf.TensorSpec((None, 2)),
}


def taped() -> Given:
    x = tf.Variable(tf.ones(2))
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(x * x)
    return on(hvd.DistributedGradientTape(tape), y, [x], None)._replace(theirs=(1, 2, 3))


TABLE: dict[str, Callable[[], Given]] = {
    "tensorflow.average:average": lambda: given({"a": tf.ones((2, 3))}, weight=2.0),
    "tensorflow.tape:DistributedGradientTape": lambda: given(tf.GradientTape(), weight=1.0),
    "tensorflow.tape:DistributedGradientTape.gradient": taped,
    "tensorflow.variables:broadcast_variables": lambda: given([tf.Variable(tf.ones(2))], 0),
}
