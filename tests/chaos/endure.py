"""One part of a soak: trains as the first argument says until its time is over, and stops itself.

Every rank appends a line of JSON to FOLDER/samples-RANK a few times a second: see `Sampler`. RANK
is its number at the start of the job. Ends with status 75, as a run that was told to stop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import mpidl
from mpidl import nn, optim, world
from mpidl.testing import Fault, Kill, Raise, Slow, Stop, inject
from tests.chaos.train import CLASSES, FEATURES, make_model, memory

BATCH = 64
SAMPLE_SECONDS = 0.25
CHECKPOINT_SECONDS = 1.0
LEAST_STEPS = {"faults": 2000, "recoveries": 0, "deaths": 0}  # or a leak of 1 KB a step is lost
ROUND_STEPS = {"faults": 400, "recoveries": 60, "deaths": 100}  # of an epoch, by what happens in it


class Samples:
    """As many as are asked for; each is drawn when it is taken."""

    def __init__(self, size: int) -> None:
        self.size = size
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((1000, FEATURES), np.float32)
        self.y = rng.integers(0, CLASSES, 1000)

    def __len__(self) -> int:
        return self.size

    def take(self, indices: Any) -> Any:
        return self.x[indices % 1000], self.y[indices % 1000]


@dataclass(frozen=True)
class Alarm:
    """The rank takes another one for dead: all recover, and none is lost."""

    rank: int
    step: int
    moment: str
    once: ClassVar[bool] = True

    def act(self, replica: mpidl.DataParallel, rng: Any, seconds: float) -> None:  # noqa: ARG002
        world.revoke(replica.world)
        raise RuntimeError("a false alarm")


def draw(kind: str, seed: int, number: int, first: int, size: int) -> list[Fault]:
    """Return the faults of a round whose first step is `first`: the same on all ranks."""
    rng = np.random.default_rng([seed, number])
    step = first + int(rng.integers(ROUND_STEPS[kind] - 10))
    rank = int(rng.integers(size))
    if kind == "recoveries":  # at any moment
        moment = ("before", "reduce", "update", "share")[int(rng.integers(4))]
        return [Alarm(rank, step, moment)]
    if kind == "deaths":
        return []
    faults: list[Fault] = [
        Stop(rank, step, round(rng.uniform(0.05, 0.2), 3), "any"),
        Slow(int(rng.integers(size)), step, rng.uniform(0.001, 0.01), steps=10),
    ]
    if rng.random() < 0.5:
        faults += [Raise(who, step + 5, "on purpose") for who in range(size)]
    return faults


class Sampler:
    """Tells what this process has taken, now and then, after a step."""

    def __init__(self, path: Path, trainer: mpidl.Trainer, leak: int) -> None:
        self.file = path.open("w", buffering=1)
        self.trainer, self.leak = trainer, leak
        self.next, self.steps = 0.0, 0
        self.kept: list[bytearray] = []

    def step(self) -> None:
        self.steps += 1
        if self.leak:
            self.kept.append(bytearray(self.leak))
        if (now := time.monotonic()) < self.next:
            return
        self.next = now + SAMPLE_SECONDS
        self.file.write(json.dumps({"time": now, "steps": self.steps, **self.look()}) + "\n")

    def look(self) -> dict[str, int]:
        """Return bytes and counts: what `flat.BOUNDS` names, and how far it has come."""
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(kib) * 1024 for name, kib, *_ in (line.split() for line in rollup)}
        probe = self.trainer.world.MPI.COMM_SELF.Dup()
        number = probe.py2f()  # of those that there are, the lowest that is free
        probe.Free()
        elastic: Any = self.trainer._elastic
        return {
            "rss": sizes["Rss:"],
            "anonymous": sizes["Anonymous:"],
            "pss": sizes["Pss:"],
            "shm": size_of(elastic.folder),
            "fds": entries("/proc/self/fd"),
            "threads": entries("/proc/self/task"),
            "communicators": number,
            "recoveries": elastic.recoveries,
            "ranks": self.trainer.world.size,
        }


def size_of(folder: Path) -> int:
    """Return the bytes of all files, some of which may be removed meanwhile."""
    size = 0
    with suppress(OSError):
        for file in folder.rglob("*"):
            with suppress(OSError):
                size += file.stat().st_size
    return size


def entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def main(asked: dict[str, Any], folder: Path) -> None:
    ranks = mpidl.init()
    rank, size, kind = ranks.rank, ranks.size, asked["kind"]
    nn.seed(1)
    trainer = mpidl.Trainer(
        make_model(0.1, True, "float32"),
        nn.cross_entropy,
        optim.Adam(1e-4),
        "hierarchical",
        microbatches=4,
        quiet=True,
        elastic=True,
        checkpoint=folder / "run",
        checkpoint_every=timedelta(seconds=CHECKPOINT_SECONDS),
    )
    (folder / f"memory-{rank}").write_text("\n".join(memory(trainer)))
    sampler = Sampler(folder / f"samples-{rank}", trainer, asked["leak"])
    end = time.monotonic() + asked["seconds"]
    plain = mpidl.DataParallel.step

    def step(replica: mpidl.DataParallel, weight: float | None = None) -> None:
        plain(replica, weight)
        sampler.step()
        over = time.monotonic() > end and sampler.steps >= LEAST_STEPS[kind]
        if over and trainer.world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    mpidl.DataParallel.step = step  # type: ignore[method-assign]
    kills: list[Fault] = []
    if kind == "deaths":
        every = asked["seconds"] / size
        kills = [Kill(who, 0, every * (size - who)) for who in range(1, size)]
    train = Samples(ROUND_STEPS[kind] * BATCH)
    with inject(trainer, *kills, record=folder / "faults"):
        for number in range(10**9):
            first = trainer.replica.steps
            faults = draw(kind, asked["seed"], number, first, trainer.world.size)
            try:
                with inject(trainer, *faults):
                    trainer.fit(train, 1, BATCH)  # type: ignore[arg-type]
            except RuntimeError as error:
                if "on purpose" not in str(error):
                    raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
