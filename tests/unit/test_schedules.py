"""Schedules against their formulas, and against PyTorch's."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument
from mpidl.optim import schedules as s

#: schedule, and its first rates, worked out by hand
FIRST = [
    (s.constant(0.3), [0.3, 0.3, 0.3]),
    (s.inverse(1.0, decay=0.5), [1, 1 / 1.5, 1 / 2, 1 / 2.5]),
    (s.inverse(2.0, decay=3.0, power=0.5), [2, 1, 2 / math.sqrt(7)]),
    (s.exponential(1.0, decay=0.5), [1, 0.5, 0.25, 0.125]),
    (s.exponential(1.0, decay=0.25, steps=2), [1, 0.5, 0.25, 0.125]),
    (s.polynomial(1.0, steps=4), [1, 0.75, 0.5, 0.25, 0, 0, 0]),
    (s.polynomial(1.0, steps=2, end=0.5, power=2), [1, 0.625, 0.5, 0.5]),
    (s.multi_step(1.0, at=(1, 3)), [1, 0.1, 0.1, 0.01, 0.01]),
    (s.multi_step(8.0, at=[2], factor=0.5), [8, 8, 4]),
    (s.cosine(2.0, steps=3), [2, 1.5, 0.5, 0, 0]),
    (s.cosine(3.0, steps=2, end=1.0), [3, 2, 1, 1]),
    (s.triangular(1.0, 3.0, half=2), [1, 2, 3, 2, 1, 2, 3, 2, 1]),
    (s.triangular2(1.0, 3.0, half=1), [1, 3, 1, 2, 1, 1.5, 1]),
    (s.exp_range(1.0, 3.0, half=1, decay=0.5), [1, 2, 1, 1.25, 1]),
    (s.warm_up(s.constant(1.0), steps=4), [0, 0.25, 0.5, 0.75, 1, 1]),
    (s.warm_up(2.0, steps=2, start=1.0), [1, 1.5, 2, 2]),
    (s.warm_up(s.multi_step(4.0, at=(3,)), steps=2), [0, 2, 4, 0.4]),
    (s.warm_up(s.polynomial(4.0, steps=4), steps=2), [0, 1, 2, 1, 0]),
    (s.scaled(s.exponential(1.0, decay=0.5), 3), [3, 1.5, 0.75]),
    (s.scaled(0.5, 3), [1.5, 1.5]),
    (s.growing_batch(32, at=(1, 2), factor=2), [32, 64, 128, 128]),
    (s.growing_batch(10, at=(1, 2, 3), factor=1.5, limit=30), [10, 15, 22, 30, 30]),
    (s.growing_batch(100, at=(1,), factor=1.15), [100, 115]),  # in floats, a little less
]


@pytest.mark.parametrize(("schedule", "rates"), FIRST, ids=lambda v: str(v)[:60])
def test_first_rates(schedule: Any, rates: list[float]) -> None:
    found = [schedule(t) for t in range(len(rates))]
    np.testing.assert_allclose(found, rates, rtol=1e-12, atol=1e-15)
    assert {type(value) for value in found} <= {float, int}


@pytest.mark.parametrize(("schedule", "rates"), FIRST, ids=lambda v: str(v)[:60])
def test_they_can_be_written_down(schedule: Any, rates: list[float]) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(s)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))


def test_every_schedule_is_tested() -> None:
    schedules = {value for value in vars(s).values() if isinstance(value, type) and callable(value)}
    assert {kind for kind in schedules if kind.__module__ == s.__name__} <= {
        type(schedule) for schedule, _ in FIRST
    }


def smith(mode: str, t: int, low: float, high: float, half: int, gamma: float) -> float:
    """The code given in the paper, in its words."""
    cycle = math.floor(1 + t / (2 * half))
    x = abs(t / half - 2 * cycle + 1)
    factor = {"triangular": 1, "triangular2": 1 / 2 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return low + (high - low) * max(0, 1 - x) * factor


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cycles_are_those_of_the_paper(mode: str, rng: np.random.Generator) -> None:
    for _ in range(20):
        low, high = sorted(rng.uniform(0, 1, 2))
        half, gamma = int(rng.integers(1, 20)), float(rng.uniform(0.9, 1))
        more = {"decay": gamma} if mode == "exp_range" else {}
        schedule = getattr(s, mode)(low, high, half, **more)
        for t in map(int, rng.integers(0, 200, 30)):
            assert schedule(t) == pytest.approx(smith(mode, t, low, high, half, gamma), rel=1e-9)


def torch_rates(make: Any, lr: float, steps: int) -> list[float]:
    """Return the rates of PyTorch's scheduler at the first steps."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(torch.optim.lr_scheduler, optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (s.exponential(0.3, 0.9), lambda m, o: m.ExponentialLR(o, 0.9)),
        (s.multi_step(0.3, (3, 7), 0.2), lambda m, o: m.MultiStepLR(o, [3, 7], 0.2)),
        (s.polynomial(0.3, 12, power=1.7), lambda m, o: m.PolynomialLR(o, 12, power=1.7)),
        (s.cosine(0.3, 20, 0.01), lambda m, o: m.CosineAnnealingLR(o, 20, 0.01)),
        (
            s.triangular2(0.1, 0.3, 3),
            lambda m, o: m.CyclicLR(o, 0.1, 0.3, 3, mode="triangular2", cycle_momentum=False),
        ),
        (s.warm_up(0.3, 5, start=0.03), lambda m, o: m.LinearLR(o, 0.1, 1.0, total_iters=5)),
    ],
    ids=str,
)
def test_rates_are_those_of_pytorch(schedule: Any, theirs: Any) -> None:
    expected = torch_rates(theirs, 0.3, 20)
    np.testing.assert_allclose([schedule(t) for t in range(20)], expected, rtol=1e-9, atol=1e-12)


def test_warm_up_is_without_a_jump(rng: np.random.Generator) -> None:
    steps = int(rng.integers(1, 50))
    after = s.cosine(float(rng.uniform(0.1, 1)), 100)
    schedule = s.warm_up(after, steps, start=0.05)
    assert schedule(0) == 0.05
    assert schedule(steps - 1) == pytest.approx(after(steps) - (after(steps) - 0.05) / steps)
    assert [schedule(t) for t in range(steps, 120)] == [after(t) for t in range(steps, 120)]


def test_linear_scaling() -> None:
    assert s.linear_scaling(0.1, ranks=8) == pytest.approx(0.8)
    assert s.linear_scaling(0.1, ranks=1) == 0.1
    schedule = s.linear_scaling(s.multi_step(0.1, at=(10,)), ranks=8)
    assert [schedule(t) for t in (0, 9, 10)] == pytest.approx([0.8, 0.8, 0.08])
    for lr in (0.1, s.constant(0.1)):
        schedule = s.linear_scaling(lr, ranks=8, warm_up_steps=7)
        assert [schedule(t) for t in (0, 1, 7, 8)] == pytest.approx([0.1, 0.2, 0.8, 0.8])


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.constant(-1), r"constant\(lr=-1\): expected 0 <= lr < inf"),
        (lambda: s.inverse(1, NAN), r"inverse\(lr=1, decay=nan, power=1.0\): expected .* decay"),
        (lambda: s.inverse(1, 1, -1), "expected 0 <= power < inf"),
        (lambda: s.exponential(1, 0), "expected 0 < decay <= 1"),
        (lambda: s.exponential(1, 1.1), "expected 0 < decay <= 1"),
        (lambda: s.exponential(1, 0.5, 0), "expected steps to be a whole number, 1 or more"),
        (lambda: s.exponential(math.inf, 0.5), "expected 0 <= lr < inf"),
        (lambda: s.polynomial(1, 2.5), "expected steps to be a whole number"),
        (lambda: s.polynomial(1, 2, end=-1), "expected 0 <= end < inf"),
        (lambda: s.multi_step(1, (3, 3)), "steps from 0 on, each above the one before"),
        (lambda: s.multi_step(1, (-1, 3)), "steps from 0 on"),
        (lambda: s.multi_step(1, (1,), NAN), "expected 0 <= factor"),
        (lambda: s.cosine(1, 0), "expected steps"),
        (lambda: s.cosine(NAN, 1), "expected 0 <= lr"),
        (lambda: s.triangular(-1, 1, 1), "expected 0 <= low"),
        (lambda: s.triangular(0, 1, 0), "expected half"),
        (lambda: s.triangular2(0, NAN, 1), "expected 0 <= high"),
        (lambda: s.triangular2(0, 1, 0.5), "expected half"),
        (lambda: s.exp_range(0, 1, 1, 2), "expected 0 < decay <= 1"),
        (lambda: s.exp_range(0, -1, 1, 1), "expected 0 <= high"),
        (lambda: s.exp_range(0, 1, -1, 1), "expected half"),
        (lambda: s.warm_up(-1, 5), "expected 0 <= schedule < inf"),
        (lambda: s.warm_up(1, 0), "expected steps"),
        (lambda: s.warm_up(1, 5, start=-1), "expected 0 <= start"),
        (lambda: s.scaled(1, -1), "expected 0 <= factor"),
        (lambda: s.scaled(NAN, 1), "expected 0 <= schedule"),
        (lambda: s.linear_scaling(1, ranks=0), r"ranks=0.*expected 1 rank and 0 steps, or more"),
        (lambda: s.linear_scaling(1, ranks=1, warm_up_steps=-1), "warm_up_steps=-1"),
        (lambda: s.growing_batch(0, ()), "expected size to be a whole number, 1 or more"),
        (lambda: s.growing_batch(1, (2, 1)), "each above the one before"),
        (lambda: s.growing_batch(1, (), 0.5), "expected 1 <= factor < inf"),
        (lambda: s.growing_batch(1, (), limit=0), "expected limit"),
    ],
)
def test_values_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()
