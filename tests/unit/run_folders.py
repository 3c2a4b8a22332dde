"""Run folders as `Trainer(out=...)` writes them, of runs that never were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PHASES = ("compute", "data", "wait", "reduce", "update", "other")
START = 1_790_000_000.0


def make(
    folder: Path,
    rng: np.random.Generator,
    *,
    ranks: int = 4,
    epochs: int = 20,
    steps: int = 78,
    batch: int = 256,
    slow: int | None = None,
    first: int = 0,
    ended: bool = True,
    lines: int = 8,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose loss falls, with rank `slow` half as fast in the middle of it.

    `steps` are an epoch's, `lines` those of kind "steps" in it, `first` the epochs done before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = 0.008 * rng.uniform(0.95, 1.05, ranks) * batch / 256 * 4 / ranks
    now, metrics, times = START, [], []
    totals = {p: np.zeros(ranks) for p in PHASES}
    for epoch in range(first, first + epochs):
        busy = own[:, None] * rng.lognormal(0, 0.08, (ranks, 8))
        if slow is not None and epochs // 3 <= epoch - first < 2 * epochs // 3 + 1:
            busy[slow] *= 2
        seconds = {
            "compute": busy,
            "data": 0.04 * busy * rng.uniform(0.5, 2, busy.shape),
            "wait": busy.max(0) * 1.02 - busy + 1e-4,
            "reduce": np.full_like(busy, 0.0012 + 0.0002 * np.log2(ranks)),
            "update": 0.06 * busy,
            "other": np.full_like(busy, 2e-4),
        }
        step = float(sum(v[0].mean() for v in seconds.values()))
        for i in range(min(lines, steps)):
            here = epoch * steps + (i + 1) * steps // min(lines, steps)
            now += step * steps / min(lines, steps)
            loss = 2.1 * np.exp(-here / (4 * steps)) + 0.09 + rng.normal(0, 0.03)
            metrics.append({
                "kind": "steps", "step": here, "count": max(1, steps // min(lines, steps)),
                "time": now, "loss": abs(loss) + 0.01,
                "samples_per_second": batch / step * rng.uniform(0.97, 1.03),
                "seconds": {p: float(v[0, i % 8]) for p, v in seconds.items()},
            })  # fmt: skip
        here = (epoch + 1) * steps
        phases = {p: v.mean(1) * steps for p, v in seconds.items()}
        for p, v in phases.items():
            totals[p] += v
        loss = 2.1 * np.exp(-here / (4 * steps)) + 0.09
        scale = 150 + 900 * (1 - np.exp(-here / (8 * steps)))
        metrics.append({
            "kind": "epoch", "epoch": epoch + 1, "steps": here, "loss": loss,
            "metrics": {"loss": loss * 1.05 + 0.02 * epoch / 20 + rng.normal(0, 0.01),
                        "accuracy": 0.985 - 0.35 * loss / 2.2 + rng.normal(0, 0.002)},
            "seconds": step * steps, "samples_per_second": batch / step, "time": now,
            "phases": {p: v.tolist() for p, v in phases.items()},
            "moved_bytes": [int(v) for v in rng.integers(9e7, 11e7, ranks)],
            "peak_memory_bytes": [int(v) for v in rng.integers(2e8, 3e8, ranks)],
            "noise": {"scale": scale * rng.uniform(0.9, 1.1), "trace": 3.0, "squared_norm": 0.01,
                      "batch": batch, "estimates": steps},
        })  # fmt: skip
        times.append({
            "epoch": epoch + 1, "first_step": epoch * steps, "steps_per_column": -(-steps // 8),
            "seconds": {p: v.tolist() for p, v in seconds.items()},
        })  # fmt: skip
    config = {
        "strategy": "hierarchical", "codec": None,
        "optimizer": {"SGD": {"lr": 0.1, "momentum": 0.9}}, "device": "cpu",
        "samples": steps * batch, "epochs": first + epochs, "batch_size": batch, "seed": 0,
        "started": "2026-11-22T08:00:00+00:00", "command": ["train.py", "--lr", "0.1"],
        "ranks": ranks, "nodes": -(-ranks // 4), "hosts": [f"node{r // 4}" for r in range(ranks)],
        "mpi": "Open MPI v5.0.8", "versions": {"mpidl": "0.1.0", "numpy": "2.4.6"}, "threads": 1,
        "cpu": "A CPU", "cores": 64, "accelerators": [None] * ranks,
        "model": {"parameters": 51_000, "bytes": 204_000}, "accumulate": 1, "microbatches": None,
    }  # fmt: skip
    wall = sum(v.max() for v in totals.values())
    done = (first + epochs) * steps
    whole = sum(float(v.sum()) for v in totals.values())
    work = sum(float(totals[p].sum()) for p in ("compute", "data", "update"))
    summary = {
        "ranks": ranks, "steps": done, "seconds": wall,
        "phases": {p: v.tolist() for p, v in totals.items()},
        "slowest": int(np.argmax(totals["compute"])), "moved_bytes": 4 * 10**9,
        "peak_memory_bytes": [3 * 10**8] * ranks, "efficiency": work / (whole or 1.0),
        "advice": ["rank 2 computes 1.3 times as long as the median: look at its host"],
    }  # fmt: skip
    last = metrics[-1] if metrics else {"loss": "nan", "samples_per_second": 0.0}
    state = {
        "state": "finished" if ended else "running", "time": now, "step": done,
        "steps": done if ended else 2 * done, "epoch": first + epochs,
        "epochs": (first + epochs) * (1 if ended else 2), "loss": last["loss"],
        "samples_per_second": last["samples_per_second"], "ranks": ranks, "waiting": 0.04,
        "seconds_left": 0.0 if ended else 83.0,
    }  # fmt: skip
    write(folder / "config.json", [config | (settings or {})])
    write(folder / "metrics.jsonl", metrics)
    write(folder / "times.jsonl", times)
    write(folder / "state.json", [state])
    if ended:
        write(folder / "summary.json", [summary])
    return folder


def write(file: Path, records: list[dict[str, Any]]) -> None:
    """Write one record a line."""
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
