"""A gradient tape whose gradients are means over ranks."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mpidl.tensorflow.average import average


class DistributedGradientTape:
    """A tf.GradientTape whose `gradient` is the mean over ranks; all else is the tape's own.

    `weight` is what this rank's part of the batch counts, as in `average`.
    """

    def __init__(self, tape: Any, *, weight: Any = 1.0) -> None:
        self.tape, self.weight = tape, weight

    def __enter__(self) -> DistributedGradientTape:
        self.tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.tape.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tape, name)

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Return the mean over ranks of what the tape returns; dense. Collective."""
        mine = self.tape.gradient(target, sources, output_gradients, unconnected_gradients)
        return average(mine, weight=self.weight)
