"""What the gradient noise scale forgets, and what it advises."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpidl.noise import FEW, MEMORY, NoiseScale, advice
from mpidl.optim import schedules
from mpidl.strategies import AllReduce


def scale() -> NoiseScale:
    group: Any = SimpleNamespace(
        world=SimpleNamespace(size=2), strategy=AllReduce.__new__(AllReduce)
    )
    return NoiseScale(1, group, [], by_pass=False)


def record(value: Any, batch: float, estimates: int = 50) -> dict[str, Any]:
    return {"scale": value, "batch": batch, "estimates": estimates, "trace": 1, "squared_norm": 1}


def test_before_the_first_estimate() -> None:
    noise = scale()
    assert math.isnan(noise.scale)
    assert noise.record() is None
    assert noise.advice(0.1, 1000) == advice(None) == []


def test_the_first_estimates_are_soon_forgotten(rng: np.random.Generator) -> None:
    """Until there are many, the k-th counts k times."""
    noise, found = scale(), rng.uniform(1, 2, (60, 2))
    for k, pair in enumerate(found, 1):
        noise.add(*map(float, pair))
        expected = np.average(found[:k], axis=0, weights=np.arange(k) + 1)
        np.testing.assert_allclose([noise.trace, noise.squared_norm], expected)
    assert noise.scale == noise.trace / noise.squared_norm


def test_later_the_old_ones_fade() -> None:
    noise = scale()
    for _ in range(300):
        noise.add(1.0, 1.0)
    for _ in range(MEMORY):
        noise.add(1001.0, 1.0)
    np.testing.assert_allclose((1001 - noise.trace) / 1000, math.exp(-1), rtol=0.03)


def test_a_record_is_json() -> None:
    noise = scale()
    noise.add(3.0, 1.5)
    noise.batch = 8.0
    found = json.loads(json.dumps(noise.record(), allow_nan=False))
    assert found == {"scale": 2.0, "trace": 3.0, "squared_norm": 1.5, "batch": 8, "estimates": 1}
    noise.add(3.0, -9.0)  # noise hides the gradient
    found = json.loads(json.dumps(noise.record(), allow_nan=False))
    assert (found["scale"], noise.scale) == ("inf", math.inf)
    assert noise.advice()[0].startswith("batch 8: noise hides the gradient")


@pytest.mark.parametrize(
    ("value", "batch", "first"),
    [
        (
            5213.0,
            256,
            "noise scale 5,200 samples, batch 256: up to 20 x more ranks would still pay",
        ),
        (8192 / 6, 8192, "batch 8,192 is 6.0 x the noise scale: more ranks bring little"),
        (300.0, 256, "batch 256 is about the noise scale, 300 samples: time and samples balance"),
        (0.0, 256, "batch 256: its samples have the same gradient: more ranks bring nothing"),
        (
            "inf",
            256,
            "batch 256: noise hides the gradient: more ranks, or a larger batch, would pay",
        ),
    ],
)
def test_first_lines(value: Any, batch: int, first: str) -> None:
    assert advice(record(value, batch))[0] == first


def test_no_batch_exceeds_the_data() -> None:
    lines = advice(record(5e3, 256), samples=1000)
    assert lines[0] == (
        "noise scale 5,000 samples, more than the 1,000 there are: a larger batch pays"
    )


def test_what_another_batch_changes() -> None:
    """McCandlish et al., section 2.3: (S / S_min - 1) (E / E_min - 1) = 1."""
    for value, batch, other in ((6400.0, 64, 6400), (640.0, 6400, 640), (100.0, 100, 200)):
        (line,) = (found for found in advice(record(value, batch)) if "to a loss" in found)
        updates, examples = ((1 + value / b, 1 + b / value) for b in (batch, other))
        (s, e), (s_other, e_other) = updates, examples
        np.testing.assert_allclose([(s - 1) * (e - 1), (s_other - 1) * (e_other - 1)], 1)
        first, second = map(float, re.findall(r"([\d.]+) x", line))
        changes = (s / s_other, e_other / e) if other > batch else (e / e_other, s_other / s)
        np.testing.assert_allclose([first, second], changes, rtol=0.06)


@pytest.mark.parametrize("value", [5213.0, 20.0])
def test_the_rate_goes_with_the_batch(value: float) -> None:
    lr, samples = schedules.cosine(0.1, 100)(0), 60000
    (line,) = (found for found in advice(record(value, 256), lr, samples) if "SGD noise" in found)
    g, batch, kept = map(float, re.findall(r"[=d-z] ([\d.]+)(?![\d.]* -)", line.replace("N/B", "")))
    assert batch == (512 if value > 256 else 128)
    np.testing.assert_allclose(kept * (samples / batch - 1), lr * (samples / 256 - 1), rtol=1e-2)
    np.testing.assert_allclose(g, lr * (samples / 256 - 1), rtol=0.03)


def test_few_estimates_are_a_guess() -> None:
    assert advice(record(9.0, 3, 1))[-1] == "a first guess, from 1 estimate"
    assert advice(record(9.0, 3, FEW - 1))[-1] == f"a first guess, from {FEW - 1} estimates"
    assert "guess" not in " ".join(advice(record(9.0, 3, FEW)))


def test_lines_fit_a_terminal(rng: np.random.Generator) -> None:
    for _ in range(3000):
        value: Any = 10 ** rng.uniform(-6, 12)
        value = str(rng.choice([0, math.inf])) if rng.random() < 0.05 else value
        batch = float(np.floor(10 ** rng.uniform(0, 8)))
        lr = None if rng.random() < 0.3 else 10 ** rng.uniform(-9, 3)
        samples = None if rng.random() < 0.3 else int(10 ** rng.uniform(0, 12))
        lines = advice(record(value, batch, int(rng.integers(1, 20))), lr, samples)
        assert 1 <= len(lines) <= 4
        assert [line for line in lines if len(line) > 80 or "nan" in line] == []
