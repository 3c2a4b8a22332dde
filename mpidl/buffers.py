"""Buffers of floats, such as the running means of layers: one value for all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpidl import bucket
from mpidl.array import namespace, to_numpy

if TYPE_CHECKING:
    from mpidl.nn import Module
    from mpidl.strategies import Strategy
    from mpidl.world import World


def average_over_ranks(model: Module, world: World) -> None:
    """Make each its mean over ranks. Collective.

    Those of float32 that are equal on all ranks keep their bits.
    """
    buffers = [b for b in model.buffers() if b.dtype.kind == "f"]
    if not buffers or world.size == 1:
        return
    flat = np.concatenate([to_numpy(b.data).reshape(-1).astype(np.float64) for b in buffers])
    means = world.sum(flat) / world.size
    for buffer in buffers:
        mine, means = means[: buffer.size], means[buffer.size :]
        value = mine.reshape(buffer.shape).astype(buffer.dtype)
        buffer.data[...] = namespace(buffer.data).asarray(value)


class BufferMean:
    """After a step, the mean over its microbatches.

    Each microbatch begins with the values of the step before. They travel as gradients do.
    """

    def __init__(self, model: Module, strategy: Strategy) -> None:
        self.strategy = strategy
        self._buffers = {n: b for n, b in model.named_buffers().items() if b.dtype.kind == "f"}
        arrays = {name: b.data for name, b in self._buffers.items()}
        self.buckets = bucket.allocate(arrays, strategy, bucket.BUCKET_BYTES)
        for flat in self.buckets:
            values = namespace(flat.param).zeros_like(flat.param)
            for name, part in flat.slices().items():
                values[part] = arrays[name].reshape(-1)
            owned = strategy.owned(values.size)
            flat.param[owned] = values[owned]
            strategy.share(flat.param)

    def take(self) -> None:
        """Leave the buffers' values as gradients, and return to those of the step before."""
        for flat in self.buckets:
            for name, before, grad in flat.views():
                grad[...] = self._buffers[name].data
                self._buffers[name].data[...] = before

    def publish(self, weight: float) -> None:
        """Make the buffers `weight` times the sums over microbatches. Collective."""
        for flat in self.buckets:
            for part, mean in self.strategy.reduce(flat.grad, weight):
                flat.param[part] = mean
            self.strategy.share(flat.param)
            for name, param, _ in flat.views():
                self._buffers[name].data[...] = param
