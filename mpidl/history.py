"""What a training came to, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; the same on every rank."""

    epoch: int  #: from 1
    steps: int  #: since the trainer was made
    loss: float  #: of training: mean over the samples, each taken before its own update
    metrics: dict[str, float]  #: of the samples given as `evaluate`; "loss" among them
    seconds: float  #: spent in training steps, on the slowest rank
    samples_per_second: float  #: of all ranks together
