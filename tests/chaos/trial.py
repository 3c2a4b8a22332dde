"""What a trial trains, and what goes wrong in it: all drawn from its seed and number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from tests.chaos.train import OPTIMIZERS, SAMPLES

MOST_RANKS = 6
MOST_TORCH_RANKS = 4  # each takes seconds to import it
TORCH = find_spec("torch") is not None  # then one trial in four trains a model of PyTorch
SECONDS = 1.0  # that many runs take without faults
EXACT = ("hierarchical", "auto")  # those that take microbatches: weights must be the same bits
INEXACT = ("allreduce", "hierarchical", "parameter_server", "ring", "sharded")  # without
MOMENTS = ("before", "reduce", "update", "share", "any", "any", "any")
IN_RECOVERY, CALLS = 0.25, 80  # how often a rank dies in one of the first calls of a recovery
ENDING = 0.1  # seconds around a run's end
RECOVERY = 0.05  # seconds from a kill to another one, on average: while the others recover


@dataclass(frozen=True)
class Trial:
    number: int
    ranks: int
    paced: bool  #: whether a run takes SECONDS, with snapshots meanwhile, or as little as it can
    training: dict[str, Any]  #: as tests.chaos.train reads it, but for "how" and "pace"
    faults: list[dict[str, Any]]  #: as mpidl.testing reads them

    @property
    def steps(self) -> int:
        """How many updates there must be."""
        each = math.ceil(SAMPLES / self.training["batch_size"])
        return each * self.training["epochs"]

    @property
    def pace(self) -> float:
        """How many seconds a step is to take at least."""
        return SECONDS / self.steps if self.paced else 0.0

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {value}" for name, value in asdict(self).items())


def draw(seed: int, number: int) -> Trial:
    rng = np.random.default_rng([seed, number])

    def one(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    trains_torch = TORCH and number % 8 > 5  # not in short runs
    ranks = int(rng.integers(2, (MOST_TORCH_RANKS if trains_torch else MOST_RANKS) + 1))
    exact = rng.random() < 0.75
    training = {
        "seed": int(rng.integers(2**31)),
        "strategy": one(EXACT if exact else INEXACT),
        "microbatches": int(rng.integers(2, 9)) if exact else None,
        "batch_norm": exact and bool(rng.random() < 0.3),
        "workers": one([None, None, None, 0, 1]),
        "evaluate": bool(rng.random() < 0.3),
        "checkpoint_every": one([None, None, 3, 10]),
        "optimizer": one(list(OPTIMIZERS)),
        "dropout": one([0.0, 0.2]) if exact else 0.0,  # noise depends on who computes
        "clip_norm": one([None, 0.5]),
        "epochs": int(rng.integers(2, 5)),
        "batch_size": one([64, 100, 128, 200, 256]),
    }
    training["commit_every"] = one([1, 2, 5])
    training["torch"] = trains_torch
    if trains_torch:
        if training["microbatches"] is None:
            training.update(strategy=one(EXACT), microbatches=int(rng.integers(2, 9)))
        rest = SAMPLES % training["batch_size"]  # PyTorch does not normalize single samples
        training["batch_norm"] &= rest // training["microbatches"] > 1
    trial = Trial(number, ranks, bool(rng.random() < 0.6), training, [])
    victims = [*map(int, rng.permutation(ranks))][: ranks - 1]  # one is left
    for _ in range(int(rng.integers(1, 4))):
        kind = one(["Kill", "Kill", "Kill", "Kill", "Stop", "Slow"])
        step = int(rng.integers(trial.steps))
        if kind == "Kill" and victims:
            fault = {"fault": "Kill", "rank": victims.pop(), "step": step, "moment": one(MOMENTS)}
            before = [f for f in trial.faults if f["fault"] == "Kill"]
            if before and rng.random() < 0.5:  # while the ranks recover
                fault.update(step=before[-1]["step"], moment=round(rng.exponential(RECOVERY), 4))
            elif rng.random() < 0.1:  # while the run ends
                fault.update(step=trial.steps - 1, moment=round(rng.uniform(0, ENDING), 3))
        elif kind == "Slow":
            seconds = round(rng.uniform(1, 3) / trial.steps, 4)
            fault = {"fault": "Slow", "rank": int(rng.integers(ranks)), "seconds": seconds}
        else:
            seconds = round(rng.uniform(0.3, 1), 2)
            fault = {"fault": "Stop", "rank": int(rng.integers(ranks)), "seconds": seconds}
            fault.update(step=step, moment=one(MOMENTS))
        trial.faults.append(fault)
    kills = sum(fault["fault"] == "Kill" for fault in trial.faults)
    dies = kills and victims and rng.random() < IN_RECOVERY
    call = int(rng.integers(CALLS))
    training["in_recovery"] = {"rank": victims.pop(), "call": call} if dies else None
    return trial
