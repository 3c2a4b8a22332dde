"""Trains for long with faults again and again, and looks whether anything grows.

In parts: one long training in the same processes, with ranks that stop, are slow, and raise, with
snapshots and checkpoints meanwhile; one with very many recoveries, of deaths that only one rank
believes in, so that none is lost; and trainings in which ranks are killed until one is left, each
started anew.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpidl.config import EXIT_REQUEUE
from tests.chaos import flat, run
from tests.chaos.verdict import in_memory, unexplained

SHARES = {"faults": 0.45, "recoveries": 0.3, "deaths": 0.25}  # of the time
DEATHS_SECONDS = 12.0  # that a run takes in which ranks are killed until one is left
GRACE_SECONDS = 180.0  # for a run to start, to make the least steps, and to end


@dataclass
class Part:
    """What a run came to."""

    kind: str
    seconds: float = 0.0
    steps: int = 0
    recoveries: int = 0
    finds: float = 0.0  #: bytes a step: a leak of more would have been seen
    grown: dict[str, float] = field(default_factory=dict)  #: the most that any rank has, by name
    problems: list[str] = field(default_factory=list)


def endure(kind: str, seconds: float, ranks: int, seed: int, leak: int = 0) -> Part:
    """Make one run of so many seconds; with `leak` bytes kept at each step, on purpose."""
    folder = Path(tempfile.mkdtemp(prefix="mpidl-soak-"))
    asked = {"kind": kind, "seconds": seconds, "seed": seed, "leak": leak}
    script = str(run.FOLDER / "endure.py")
    line = ["-n", str(ranks), "--elastic", script, json.dumps(asked), str(folder)]
    try:
        made = run.job_of(line, folder, seconds + GRACE_SECONDS)
        return judge(kind, ranks, made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judge(kind: str, ranks: int, made: run.Run) -> Part:
    """Look at what a run has left."""
    part = Part(kind, seconds=round(made.seconds, 1))
    wrong = part.problems
    if made.status is None:
        wrong.append(f"hung: {made.stacks}")
    elif made.status != EXIT_REQUEUE:  # it was told to stop
        wrong.append(f"exit status {made.status}:\n{made.output[-4000:]}")
    wrong += unexplained(made.output)
    wrong += [f"process {pid} outlived the launcher" for pid in made.left]
    wrong += [f"{path} is left in memory" for path in in_memory(made.folder)]
    killed = {told["rank"] for told in run.told(made.folder, "faults/*.json").values()}
    if kind == "deaths" and len(killed) != ranks - 1:
        wrong.append(f"killed were ranks {sorted(killed)} of {ranks}")
    for rank in sorted(set(range(ranks)) - killed):
        samples = flat.Samples.read(made.folder / f"samples-{rank}")
        grown = samples.growths()
        if not grown:
            wrong.append(f"rank {rank} told of {len(samples.times)} samples")
            continue
        begun, *_, ended = samples.values["recoveries"]
        found = flat.problems(grown, fewer=kind == "deaths", recoveries=ended - begun)
        wrong += [f"rank {rank}: {text}" for text in found]
        part.steps = max(part.steps, int(samples.values["steps"][-1]))
        part.recoveries = max(part.recoveries, int(samples.values["recoveries"][-1]))
        for name, value in grown.items():
            part.grown[name] = max(part.grown.get(name, value), round(value, 1))
    if part.steps:
        part.finds = round(flat.BOUNDS["rss"] / (1 - flat.WARM_UP) / part.steps, 1)
    if kind == "recoveries" and not part.recoveries:
        wrong.append("no recovery")
    return part


def soak(seconds: float, ranks: int, seed: int, leak: int = 0) -> dict[str, Any]:
    """Make all parts, which take so many seconds together. Returns what they came to."""
    begin = time.monotonic()
    parts = [
        endure(kind, SHARES[kind] * seconds, ranks, seed, leak) for kind in ("faults", "recoveries")
    ]
    runs = max(1, round(SHARES["deaths"] * seconds / DEATHS_SECONDS))
    each = SHARES["deaths"] * seconds / runs
    parts += [endure("deaths", each, ranks + number % 2, seed + number) for number in range(runs)]
    return {
        "soak": True,
        "ranks": ranks,
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
        "failed": sum(bool(part.problems) for part in parts),
        "parts": [asdict(part) for part in parts],
    }
