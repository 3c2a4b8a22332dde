"""`mpidl bench engine`: the built-in engine against PyTorch eager, both on one thread.

Time: one process makes steps of both in turns; medians. Memory: one process each makes steps; the
peak of its resident memory over that before the model was made. Overhead: chains of operations on
10 elements, forward and backward, per operation; user time of the thread, the best of many.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

from mpidl.bench.step import check_names
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODELS = ("mlp", "cnn", "transformer")
TURNS = 25
MEMORY_STEPS = 5
CHAIN = 1000  # operations


def run(turns: int = TURNS, models: Sequence[str] = MODELS) -> dict[str, Any]:
    """Return {"rows": one for each model, "overhead": one for each chain of operations}.

    Raises InvalidArgument for a name that no model has.
    """
    check_names("model", models, MODELS)
    rivals = ["mpidl", *(["torch"] if importlib.util.find_spec("torch") else [])]
    rows = []
    for name in models:
        times = _child("time", name, str(turns), *rivals)
        peaks = {rival: _child("memory", name, rival) for rival in rivals}
        row: dict[str, Any] = {"model": name}
        row |= {"mpidl_ms": times["mpidl"], "torch_ms": times.get("torch")}
        row["ratio"] = times["mpidl"] / times["torch"] if "torch" in times else None
        row |= {"mpidl_peak_mb": peaks["mpidl"], "torch_peak_mb": peaks.get("torch")}
        rows.append(row)
    return {"rows": rows, "overhead": _child("overhead", str(turns), *rivals)}


def _child(*arguments: str) -> Any:
    """Run this file in a process of its own, on one thread, and return what it prints."""
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(threads, "1")}
    command = [sys.executable, "-m", __name__, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MpidlError(f"the benchmark {' '.join(arguments)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def _time(name: str, turns: str, *rivals: str) -> dict[str, float]:
    steps = {rival: _step(rival, name) for rival in rivals}
    taken: dict[str, list[float]] = {rival: [] for rival in rivals}
    for turn in range(-3, int(turns)):
        for rival, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 0:  # those before warm up
                taken[rival].append((time.perf_counter() - start) * 1e3)
    return {rival: median(values) for rival, values in taken.items()}


def _memory(name: str, rival: str) -> float:
    """Return MB (10^6 bytes)."""
    from mpidl.bench import engine_models

    if rival == "torch":
        import torch

        from mpidl.bench import engine_torch  # noqa: F401  # its import counts as before the model

        x: Any = torch.ones(8, requires_grad=True)
        x.sum().backward()  # starts its threads
    engine_models.batch(name)
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):  # the peak from now on: not all kernels allow it
        Path("/proc/self/clear_refs").write_text("5")
    step = _step(rival, name)
    for _ in range(MEMORY_STEPS):
        step()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise MpidlError(f"/proc/self/status has no {field}")


def _step(rival: str, name: str) -> Callable[[], None]:
    if rival == "torch":
        from mpidl.bench.engine_torch import in_torch

        return in_torch(name)
    from mpidl.bench.engine_models import in_mpidl

    return in_mpidl(name)


def _overhead(turns: str, *rivals: str) -> list[dict[str, Any]]:
    from mpidl.bench import engine_chains

    chains = {rival: engine_chains.of(rival) for rival in rivals}
    rows = []
    for name in engine_chains.NAMES:
        best = dict.fromkeys(rivals, float("inf"))
        for _ in range(2 * int(turns)):
            for rival in rivals:
                start = time.thread_time()
                chains[rival][name](CHAIN).sum().backward()
                best[rival] = min(best[rival], (time.thread_time() - start) / CHAIN * 1e6)
        row: dict[str, Any] = {"chain": name, "mpidl_us": best["mpidl"]}
        row["torch_us"] = best.get("torch")
        row["ratio"] = best["mpidl"] / best["torch"] if "torch" in best else None
        rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in (("a training step", report["rows"]), ("an operation", report["overhead"])):
        table = Table(title=title)
        for column in rows[0]:
            side: Any = "left" if column in ("model", "chain") else "right"
            table.add_column(column.replace("_", " "), justify=side)
        for row in rows:
            cells = (f"{v:.2f}" if isinstance(v, float) else str(v or "-") for v in row.values())
            table.add_row(*cells)
        console.print(table)
    ratios = [row["ratio"] for row in report["overhead"] if row["ratio"]]
    if ratios:
        console.print(f"overhead of an operation: {geometric_mean(ratios):.2f} of PyTorch's")


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    kinds: dict[str, Callable[..., Any]] = {"time": _time, "memory": _memory, "overhead": _overhead}
    print(json.dumps(kinds[sys.argv[1]](*sys.argv[2:])))
