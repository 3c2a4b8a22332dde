"""`LossSum`: the loss of an epoch, so far."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpidl import exact
from mpidl.loss_sum import WAITING, LossSum


def test_the_mean_is_of_what_was_added_here(rng: np.random.Generator) -> None:
    losses = rng.standard_normal(WAITING + 7).astype(np.float32)
    samples = rng.integers(1, 50, losses.size)
    others = list(rng.standard_normal(3) * 1e9)
    found = LossSum(others)
    assert math.isnan(found.mean())
    for step, (loss, count) in enumerate(zip(losses, samples, strict=True)):
        found.add(np.array([loss]), int(count), step)
        if step == 5:  # to look changes nothing
            found.mean()
    assert found.mean() == pytest.approx(float(np.average(losses, weights=samples)), rel=1e-6)
    total = [float(x) * int(n) for x, n in zip(losses, samples, strict=True)]
    assert exact.total(found.parts()) == exact.total([*others, *total])


def test_a_loss_that_is_no_number_shows() -> None:
    found = LossSum()
    found.add(np.array([math.inf]), 2, 0)
    assert not math.isfinite(found.mean())
