"""Which numbers of a record TensorBoard gets."""

from __future__ import annotations

from mpidl import optim
from mpidl.tensorboard import rates, scalars


def test_an_epoch() -> None:
    record = {
        "kind": "epoch",
        "epoch": 2,
        "steps": 20,
        "loss": "inf",
        "metrics": {"top 5": 0.75, "loss": 0.5},
        "seconds": 2.0,
        "samples_per_second": 100.0,
        "phases": {"compute": [1.0, 2.0], "wait": [1.0, 0.0], "reduce": [0.0, 0.0]},
        "moved_bytes": [10, 20],
        "peak_memory_bytes": [5, 7],
        "noise": {"scale": 12.5, "trace": 3.0, "batch": 64},
    }
    assert dict(scalars(record)) == {
        "loss/epoch": float("inf"),
        "samples_per_second/epoch": 100.0,
        "test/top_5": 0.75,
        "test/loss": 0.5,
        "phases/compute": 0.75,
        "phases/wait": 0.25,
        "phases/reduce": 0.0,
        "noise/scale": 12.5,
        "noise/trace": 3.0,
        "noise/batch": 64.0,
        "memory/peak_bytes": 7.0,
        "moved_bytes/epoch": 30.0,
    }


def test_steps_between() -> None:
    seconds = {"compute": 0.003, "wait": 0.001}
    record = {
        "kind": "steps",
        "step": 9,
        "loss": 0.5,
        "samples_per_second": 8.0,
        "seconds": seconds,
    }
    assert dict(scalars(record)) == {
        "loss/steps": 0.5,
        "samples_per_second/steps": 8.0,
        "phases_of_rank_0/compute": 0.75,
        "phases_of_rank_0/wait": 0.25,
    }


def test_older_records_and_those_of_others() -> None:
    old = {"epoch": 1, "steps": 3, "loss": 1.0, "metrics": {}, "samples_per_second": 2.0}
    assert dict(scalars(old)) == {"loss/epoch": 1.0, "samples_per_second/epoch": 2.0}
    assert dict(scalars({"epoch": 1, "critic": 3.0})) == {}
    empty = {"loss": 1, "phases": {"compute": [0.0]}, "noise": None, "moved_bytes": []}
    assert dict(scalars(empty)) == {"loss/epoch": 1.0, "phases/compute": 0.0}


def test_rates() -> None:
    by_step = optim.SGD(lambda step: step / 8)
    assert dict(rates(by_step, 3)) == {"learning_rate": 0.25}  # of the update before
    assert dict(rates(by_step, 0)) == {"learning_rate": 0.0}
    groups = {"*.bias": optim.SGD(0.5), "*": object()}
    assert dict(rates(groups, 3)) == {"learning_rate/all.bias": 0.5}  # type: ignore[arg-type]
