"""Collective calls in which one rank passes something odd: all raise the same, and none waits.

A rank that waits is told of by the watchdog, and ends the job. The values are those of tests/fuzz.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import checkpoint, data, nn, optim, strategies
from mpidl.errors import InvalidArgument, MpidlError
from tests.conftest import ALL
from tests.fuzz.hostile import HOSTILE
from tests.ranks.conftest import DEVICE

DRAWS = 60 if ALL else 3
#: What would take memory or time for a reason, and what nobody can send or compare.
LEFT_OUT = ("2147483648", "9223372036854775808", "1000000000000000000000000000000", "1e+308",
            "broadcast_to(1, 2**22)", "(1099511627776, 2)")  # fmt: skip
VALUES = {label: make for label, make in HOSTILE.items() if label not in LEFT_OUT}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="what is checked is the same there")


def dataset() -> data.ArrayDataset:
    return data.ArrayDataset(np.ones((12, 3), np.float32), np.arange(12) % 3)


def replica() -> mpidl.DataParallel:
    nn.seed(0)
    return mpidl.DataParallel(nn.Linear(3, 3), optim.SGD(0.1), "allreduce")


def trainer() -> mpidl.Trainer:
    nn.seed(0)
    return mpidl.Trainer(nn.Linear(3, 3), nn.cross_entropy, optim.SGD(0.1), "allreduce", quiet=True)


def step(**options: Any) -> None:
    made = replica()
    try:
        made.model(np.ones((2, 3), np.float32)).sum().backward()
        made.step(**options)
    finally:
        made.close()


def fit(**options: Any) -> None:
    made = trainer()
    try:
        made.fit(**options)
    finally:
        made.close()


def evaluate(**options: Any) -> None:
    made = trainer()
    try:
        made.evaluate(**options)
    finally:
        made.close()


def build(**options: Any) -> None:
    mpidl.DataParallel(**options).close()


def save(**options: Any) -> None:
    made = replica()
    try:
        checkpoint.save(made, **options)
    finally:
        made.close()


def load(**options: Any) -> None:
    made = replica()
    try:
        checkpoint.load(made, **options)
    finally:
        made.close()


def make(**options: Any) -> None:
    strategies.make(world=mpidl.init(), size=1000, **options).strategy.close()


#: Collective functions, and valid arguments of them; the folder is the same on all ranks.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[Path], dict[str, Any]]]] = {
    "average": (mpidl.average, lambda _: {"arrays": np.ones((2, 3), np.float32), "weight": 1.0}),
    "batches": (
        lambda **options: data.batches(world=mpidl.init(), **options),
        lambda _: {"dataset": dataset(), "batch_size": 4, "seed": 1, "epoch": 0, "shuffle": True,
                   "device": "cpu", "microbatches": 2},
    ),
    "DataParallel": (
        build,
        lambda _: {"model": nn.Linear(3, 2), "optimizer": optim.SGD(0.1), "strategy": "sharded",
                   "clip_norm": 1.0, "clip_value": 1.0, "accumulate": 1, "local_steps": 1,
                   "microbatches": None, "codec": None, "overlap": False, "audit_every": 10,
                   "noise_every": 10, "bucket_bytes": 1 << 20},
    ),
    "evaluate": (evaluate, lambda _: {"dataset": dataset(), "batch_size": 4}),
    "fit": (
        fit,
        lambda _: {"train": dataset(), "epochs": 1, "batch_size": 4, "evaluate": dataset(),
                   "seed": 1, "shuffle": True},
    ),
    "load": (load, lambda folder: {"path": folder / "there", "fallback": False}),
    "Loader": (
        lambda **options: data.Loader(world=mpidl.init(), **options).close(),
        lambda _: {"dataset": dataset(), "batch_size": 4, "workers": 0, "prefetch": 1,
                   "transform": None, "seed": 1, "shuffle": True, "microbatches": 2},
    ),
    "make": (make, lambda _: {"strategy": "ring", "codec": "bf16", "microbatches": None}),
    "MinMaxScaler.fit": (
        lambda **options: data.MinMaxScaler.fit(world=mpidl.init(), **options),
        lambda _: {"dataset": dataset()},
    ),
    "save": (
        save,
        lambda folder: {"folder": folder / "made", "metrics": {"loss": 1.0}, "extra": {"a": 1},
                        "keep": 2, "best": "loss"},
    ),
    "StandardScaler.fit": (
        lambda **options: data.StandardScaler.fit(world=mpidl.init(), **options),
        lambda _: {"dataset": dataset()},
    ),
    "step": (step, lambda _: {"weight": 2.0}),
}  # fmt: skip


def outcome(call: Callable[..., Any], options: dict[str, Any]) -> tuple[str, str, bool]:
    """Return what became of a call: the error's class and text, and whether it is one of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**options)
    except MpidlError as error:
        return type(error).__name__, str(error), True
    except Exception as error:
        return type(error).__name__, str(error), False
    return "", "", True


@pytest.mark.parametrize("name", CALLS)
def test_all_ranks_raise_the_same(
    name: str,
    world: mpidl.World,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, valid = CALLS[name]
    folder = world.broadcast(tmp_path)
    monkeypatch.chdir(folder)  # some values are names of folders
    checkpoint.save(made := replica(), folder / "there")
    made.close()
    assert outcome(call, valid(folder)) == ("", "", True)
    for slot in valid(folder):
        for _ in range(DRAWS):
            label = str(rng.choice(list(VALUES)))
            odd = int(rng.integers(world.size))
            options = valid(folder)
            if world.rank == odd:
                options[slot] = VALUES[label]()
            found = outcome(call, options)
            if world.gather(0) != [0] * world.size:  # one is a call ahead: this could be anything
                raise AssertionError(f"out of step after {slot}={label} on rank {odd}")
            case = f"{name}({slot}={label}) on rank {odd} of {world.size}"
            told = world.gather(found)
            assert all(ours for _, _, ours in told), (case, told)
            assert len(set(told)) == 1, (case, told)


def test_what_python_says_of_one_rank_is_raised_on_all(world: mpidl.World) -> None:
    text = "x" if world.rank == world.size - 1 else "1"
    with pytest.raises(InvalidArgument, match="string to float: 'x'"), world.together():
        float(text)


@pytest.mark.parametrize("call", ["broadcast", "gather"])
def test_what_cannot_be_pickled_is_told_of_on_all(world: mpidl.World, call: str) -> None:
    odd = world.size - 1
    value = (lambda: 0) if world.rank == odd else 1
    root = {"root": odd} if call == "broadcast" else {}
    with pytest.raises(InvalidArgument, match=f"^rank {odd}: function cannot be pickled: "):
        getattr(world, call)(value, **root)
    assert world.gather(world.rank) == list(range(world.size))  # in step
