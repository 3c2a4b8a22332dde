"""What a trial trains, and what goes wrong in it: all drawn from its seed and number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tests.chaos.train import OPTIMIZERS, SAMPLES

MOST_RANKS = 6
SECONDS = 1.0  # that a run takes without faults
STRATEGIES = ("hierarchical", "auto")  # those that take microbatches: weights must be the same bits
MOMENTS = ("before", "reduce", "update", "share", "any", "any", "any")
RECOVERY = 0.6  # seconds after a first fault, in which a second may happen


@dataclass(frozen=True)
class Trial:
    number: int
    ranks: int
    training: dict[str, Any]  #: as tests.chaos.train reads it, but for "how" and "pace"
    faults: list[dict[str, Any]]  #: as mpidl.testing reads them

    @property
    def steps(self) -> int:
        """How many updates there must be."""
        each = math.ceil(SAMPLES / self.training["batch_size"])
        return each * self.training["epochs"]

    @property
    def pace(self) -> float:
        return SECONDS / self.steps

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {value}" for name, value in asdict(self).items())


def draw(seed: int, number: int) -> Trial:
    rng = np.random.default_rng([seed, number])

    def one(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    ranks = int(rng.integers(2, MOST_RANKS + 1))
    training = {
        "seed": int(rng.integers(2**31)),
        "strategy": one(STRATEGIES),
        "microbatches": int(rng.integers(2, 9)),
        "optimizer": one(list(OPTIMIZERS)),
        "dropout": one([0.0, 0.2]),
        "clip_norm": one([None, 0.5]),
        "epochs": int(rng.integers(2, 5)),
        "batch_size": one([64, 100, 128, 200, 256]),
    }
    trial = Trial(number, ranks, training, [])
    victims = [*map(int, rng.permutation(ranks))][: ranks - 1]  # one is left
    for _ in range(int(rng.integers(1, 4))):
        kind = one(["Kill", "Kill", "Kill", "Kill", "Stop", "Slow"])
        step = int(rng.integers(trial.steps))
        if kind == "Kill" and victims:
            fault = {"fault": "Kill", "rank": victims.pop(), "step": step, "moment": one(MOMENTS)}
            before = [f for f in trial.faults if f["fault"] == "Kill"]
            if before and rng.random() < 0.5:  # while the ranks recover
                fault.update(step=before[-1]["step"], moment=round(rng.uniform(0, RECOVERY), 3))
        elif kind == "Slow":
            seconds = round(rng.uniform(1, 3) * trial.pace, 4)
            fault = {"fault": "Slow", "rank": int(rng.integers(ranks)), "seconds": seconds}
        else:
            seconds = round(rng.uniform(0.3, 1), 2)
            fault = {"fault": "Stop", "rank": int(rng.integers(ranks)), "seconds": seconds}
            fault.update(step=step, moment=one(MOMENTS))
        trial.faults.append(fault)
    return trial
