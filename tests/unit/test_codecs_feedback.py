"""Gradient descent with codecs, on a quadratic of which each rank has a part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mpidl.codecs import Bf16, Fp16, Int8, SignSGD, TopK

from .test_codecs import coded

RANKS, SIZE, STEPS = 3, 501, 3000


@dataclass
class Averages:
    """What an exchange does: addends to the owner, and its mean to all, both encoded."""

    codec: Any
    feedback: bool
    left_out: dict[int, np.ndarray] = field(default_factory=dict)

    def mean(self, grads: np.ndarray) -> np.ndarray:
        """Return the mean of `grads` (ranks, n); the owner is rank 0."""
        total = grads[0].copy()
        for rank in range(1, len(grads)):
            total += self._send(rank, grads[rank])
        return self._send(0, total / np.float32(len(grads)))

    def _send(self, rank: int, values: np.ndarray) -> np.ndarray:
        if self.feedback:
            values = values + self.left_out.get(rank, 0)
        found = coded(self.codec, values)
        self.left_out[rank] = values - found
        return found


def distance(codec: Any, feedback: bool, rng: np.random.Generator, noise: float = 0.0) -> float:
    """Return how far from the minimum SGD ends, as a share of how far it began.

    Rank r has sum of curvature (w - c_r)^2 / 2, with a c_r of its own: its gradient stays large.
    """
    curvature = np.logspace(-1, 0, SIZE).astype(np.float32)
    rng.shuffle(curvature)
    minimum = rng.standard_normal(SIZE).astype(np.float32)
    centers = rng.standard_normal((RANKS, SIZE)).astype(np.float32)
    centers += minimum - centers.mean(0)
    w, averages = np.zeros(SIZE, np.float32), Averages(codec, feedback)
    for step in range(STEPS):
        grads = curvature * (w - centers)
        grads += noise * rng.standard_normal(grads.shape).astype(np.float32)
        w -= np.float32(0.2 / (1 + step / 100)) * averages.mean(grads)
    return float(np.linalg.norm(w - minimum) / np.linalg.norm(minimum))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("codec", [TopK(ratio=0.05), SignSGD(), Bf16(), Fp16(), Int8()], ids=str)
def test_it_gets_to_the_minimum(codec: Any, noise: float, rng: np.random.Generator) -> None:
    assert distance(codec, codec.feedback, rng, noise) < 0.03


@pytest.mark.parametrize("codec", [TopK(ratio=0.05), SignSGD()], ids=str)
def test_without_the_feedback_it_does_not(codec: Any, rng: np.random.Generator) -> None:
    assert distance(codec, False, rng) > 0.1
