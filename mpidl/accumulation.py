"""Gradient accumulation: several backward passes for each update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.array import aligned_zeros, blocks, namespace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.bucket import Bucket
    from mpidl.errors import MpidlError
    from mpidl.noise import NoiseScale


class Accumulation:
    """Sums of samples x gradient on this rank, in one more array per bucket. Not collective."""

    def __init__(
        self, buckets: Sequence[Bucket], needed: int, noise: NoiseScale | None = None
    ) -> None:
        self.buckets, self._noise = buckets, noise
        self.needed = needed  #: passes for each update
        self._sums = [aligned_zeros(b.grad.size, b.grad.dtype, namespace(b.grad)) for b in buckets]
        self._samples = 0.0
        self._problem: MpidlError | None = None
        self.passes = 0  #: since the last `mean`

    def add(self, samples: float, problem: MpidlError | None) -> None:
        """Count one more pass: a mean over `samples` in the buckets' gradients, or a problem.

        The gradients are spoiled.
        """
        if self._noise is not None:
            grads = [bucket.grad for bucket in self.buckets]
            self._noise.take(samples, grads, first=not self.passes)
        self.passes += 1
        self._problem = self._problem or problem
        if not samples:  # what the gradients hold may be NaN
            return
        for bucket, total in zip(self.buckets, self._sums, strict=True):
            for part in blocks(total):
                g = bucket.grad[part]
                g *= samples
                if self._samples:
                    total[part] += g
                else:
                    total[part] = g
        self._samples += samples

    def mean(self) -> tuple[float, MpidlError | None]:
        """Leave the mean over all samples in the buckets' gradients, and start anew.

        Returns the number of samples, and the first problem. Without samples the mean is 0.
        """
        samples, problem = self._samples, self._problem
        for bucket, total in zip(self.buckets, self._sums, strict=True):
            if samples:
                namespace(total).multiply(total, 1 / samples, out=bucket.grad)
            else:
                bucket.grad.fill(0)
        self.passes, self._samples, self._problem = 0, 0.0, None
        return samples, problem
