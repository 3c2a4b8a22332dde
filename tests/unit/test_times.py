"""Where the time went: readings, columns, the summary and its advice."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpidl import advice, clock, meter, summary, times
from mpidl.loss_sum import LossSum
from mpidl.progress import duration

PHASES = clock.PHASES


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(clock, "read", lambda: [made.now] * 6)
    return made


def test_a_reading_is_of_what_came_since_the_last(time: SimpleNamespace) -> None:
    epochs = [LossSum(), LossSum()]
    now = epochs[0]
    counted = meter.Meter(4, lambda: now)
    since = counted.begin()
    for loss, samples in ((3.0, 10), (1.0, 30)):
        now.add(np.array(loss), samples, 0)
        counted.step(2 * samples)
    time.now += 4.0
    found = since.read()
    assert (found.step, found.count, found.samples_per_second) == (2, 2, 20.0)
    assert found.loss == 1.5
    assert found.seconds == [4.0] * 6
    now = epochs[1]  # another epoch
    now.add(np.array(0.25), 10, 0)
    counted.step(20)
    time.now += 1.0
    found = since.read()
    assert (found.step, found.count, found.samples_per_second) == (3, 1, 20.0)
    assert found.loss == 0.25
    assert counted.seconds_left == pytest.approx(5 / 3)
    assert np.isnan(since.read().loss)


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 16, 17, 100, 1025])
def test_columns_hold_all_steps(steps: int) -> None:
    columns = times.Columns(8)
    rows = np.random.default_rng(steps).random((steps, 6))
    for row in rows.tolist():
        columns.append(row)
    found, per = columns.means(), columns.steps_per_column
    assert len(found) == -(-steps // per) <= 8
    for i, column in enumerate(found):
        np.testing.assert_allclose(column, rows[i * per : (i + 1) * per].mean(axis=0))


def lapped(phases: np.ndarray) -> times.Lapped:
    """Return an epoch with `phases` (6, ranks) in seconds."""
    ranks = phases.shape[1]
    return times.Lapped(
        seconds=(phases.sum(axis=0) + 9).tolist(),
        here=phases.sum(axis=0).max(),
        phases=dict(zip(PHASES, phases.tolist(), strict=True)),
        moved_bytes=[100] * ranks,
        peak_memory_bytes=[1000 + r for r in range(ranks)],
        steps_per_column=1,
        columns={},
    )


def test_totals_add_up_until_the_ranks_are_others() -> None:
    rng = np.random.default_rng()
    totals = times.Totals()
    totals.add(lapped(rng.random((6, 3))), 5)
    epochs = rng.random((2, 6, 2)) + 1
    for phases in epochs:
        totals.add(lapped(phases), 7)
    found = totals.summary(owns_parts=True)
    assert (found["ranks"], found["steps"]) == (2, 14)
    assert found["moved_bytes"] == 400
    whole = epochs.sum(axis=0)
    np.testing.assert_allclose([found["phases"][name] for name in PHASES], whole)
    assert found["slowest"] == whole[[0, 1, 4]].sum(axis=0).argmax()
    assert found["seconds"] == pytest.approx(epochs.sum(axis=1).max(axis=1).sum())
    json.dumps(found)


@pytest.mark.parametrize(("owns_parts", "expected"), [(True, 0.95), (False, 0.85)])
def test_efficiency_is_what_one_rank_would_take(owns_parts: bool, expected: float) -> None:
    """Two ranks of 8 s of computation; an update takes 2 s, whoever makes it."""
    mine = 1.0 if owns_parts else 2.0
    phases = {name: [0.0, 0.0] for name in PHASES}
    phases |= {"compute": [8.0, 8.0], "data": [0.5, 0.5], "update": [mine, mine]}
    phases |= {"reduce": [9.5 - 8.5 - mine + 0.5, 0.0], "other": [5.0, 5.0]}
    spent = sum(map(sum, phases.values())) - 10
    found = times.efficiency(phases, owns_parts=owns_parts)
    assert found == pytest.approx((16 + 1 + 2) / spent)
    assert 0 < found < 1.01


def told(ranks: int = 4, steps: int = 100, **seconds: list[float]) -> dict[str, Any]:
    phases = {name: [0.0] * ranks for name in PHASES} | {"compute": [10.0] * ranks} | seconds
    return {"ranks": ranks, "steps": steps, "phases": phases}


@pytest.mark.parametrize(
    ("found", "config", "expected"),
    [
        (told(), {}, []),
        (told(steps=0), None, []),
        (told(data=[5.0] * 4), {}, ["33% of the time is waiting for data: data.Loader"]),
        (
            told(compute=[10.0, 10.0, 20.0, 10.0], wait=[10.0, 10.0, 0.0, 10.0]),
            {"hosts": ["a", "a", "b", "b"]},
            ["rank 2 on b takes 2.0 x as long as the others (compute)"],
        ),
        (told(wait=[5.0] * 4), {}, ["33% of the time is waiting, for one rank, then another"]),
        (told(reduce=[10.0] * 4), {}, ["50% of the time is averaging: overlap, a codec"]),
        (
            told(reduce=[10.0] * 4, steps=10_000),
            {},
            ["50% of the time is averaging: a larger batch per rank"],
        ),
        (
            told(reduce=[10.0] * 4),
            {"bucket_bytes": 1 << 20},
            ['50% of the time is averaging: bucket_bytes="auto"'],
        ),
        (
            told(data=[9.0] * 4),
            {"cores": 8, "threads": 8, "ranks_on_node": 4},
            ["4 ranks with 8 threads each fight for 8 cores: OMP_NUM_THREADS=2", "47% of the"],
        ),
        (told(ranks=1, wait=[9.0]), {}, []),
    ],
)
def test_advice(found: dict[str, Any], config: dict[str, Any] | None, expected: list[str]) -> None:
    lines = advice.of(found, config)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("ranks", [1, 3, 1000])
def test_the_table_fits_in_80_columns(ranks: int) -> None:
    phases = np.random.default_rng().random((6, ranks)) * 1e6
    totals = times.Totals()
    totals.add(lapped(phases), 3)
    found = {**totals.summary(owns_parts=True), "advice": ["too [bold]slow[/]", "second"]}
    found["noise"] = {"scale": 1000.0, "batch": 100, "estimates": 50}
    text = summary.table(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "advice: too [bold]slow[/]" in text
    assert "second" not in text
    assert "noise scale 1,000 samples, batch 100: up to 10 x more ranks" in text
    assert "\x1b" not in text
    mean = phases[0].mean() * 1000 / 3
    assert f"{mean:,.0f}" in text.splitlines()[2]


def test_units() -> None:
    assert summary.amount(999) == "999 B"
    assert summary.amount(1000) == "1 kB"
    assert summary.amount(999_700) == "1 MB"
    assert summary.amount(12_345_678) == "12.3 MB"
    assert [duration(s) for s in (None, 59.6, 3723, float("inf"))] == [
        *("-:--", "1:00", "1:02:03", "-:--")
    ]
