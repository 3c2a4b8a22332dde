"""The tables of a page, as texts."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.clock import PHASES
from mpidl.report import noise, scaling
from mpidl.report.drawing import duration, finite, percent, short, size
from mpidl.report.values import number, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.run import Epoch, Run

LONG = 300  # characters of a value of a configuration
ROWS = 200  # of a table of epochs; the file has all
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
MISSING = "-"
LARGER, SMALLER = ("accuracy",), ("loss",)  # which is better; of other metrics nobody told


@dataclass(frozen=True)
class Table:
    """A table with names of its columns, and rows whose first cell is their name."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    differ: frozenset[str] = frozenset()  #: names of rows whose cells are not all the same
    note: str = ""
    run: str = ""


def facts(run: Run) -> dict[str, str]:
    """Return what matters most of a run: name -> text."""
    last: Epoch | None = run.epochs[-1] if run.epochs else None
    found = {"state": state(run), "ranks": _ranks(run)}
    if last is not None:
        found["epochs"] = short(last.epoch)
        found["updates"] = short(last.steps, 9)
        found["training loss"] = short(last.loss)
        for name in last.metrics:
            column = [e.metrics[name] for e in run.epochs if name in e.metrics]
            found[f"test {name}"] = short(column[-1])
            good = finite(column)
            if good and name not in LARGER:
                found[f"lowest test {name}"] = short(min(good))
            if good and name not in SMALLER:
                found[f"highest test {name}"] = short(max(good))
        found["time in training steps"] = duration(sum(finite([e.seconds for e in run.epochs])))
    found["samples / s"] = short(scaling.rate(run))
    efficiency = number(run.summary.get("efficiency"))
    if math.isfinite(efficiency):
        found["efficiency"] = percent(efficiency)
    if phases := run.phases():
        total = sum(v.sum() for v in phases.values()) or math.nan
        found["waiting for other ranks"] = percent(phases["wait"].sum() / total)
        found["averaging"] = percent(phases["reduce"].sum() / total)
    if (scale := noise.of(run)) is not None:
        found["critical batch"] = f"{short(scale.scale, 3)} samples"
    moved = sum(finite([b for e in run.epochs for b in e.moved_bytes]))
    if moved:
        found["sent between ranks"] = size(moved)
    memory = finite([b for e in run.epochs for b in e.peak_memory_bytes])
    if memory:
        found["peak memory of a rank"] = size(max(memory))
    return {name: text for name, text in found.items() if text != "nan"}


def state(run: Run) -> str:
    """Return whether a run goes on, and how far it is."""
    told = run.state.get("state")
    word = printable(str(told)) if told else "finished" if run.summary else "unknown"
    step, steps = number(run.state.get("step")), number(run.state.get("steps"))
    if word != "finished" and step == step and steps == steps:
        word += f", update {short(step, 9)} of {short(steps, 9)}"
    return word


def _ranks(run: Run) -> str:
    nodes = run.config.get("nodes")
    on = f" on {nodes} node{'s' * (nodes != 1)}" if isinstance(nodes, int) else ""
    return f"{run.ranks or 'unknown'}{on}"


def beside(
    title: str, runs: Sequence[Run], columns: Sequence[dict[str, str]], *, mark: bool = True
) -> Table:
    """Return a table with one column a run; with `mark` rows that differ are told."""
    names = dict.fromkeys(name for column in columns for name in column)  # in order
    rows = tuple((name, *(c.get(name, MISSING) for c in columns)) for name in names)
    differ = frozenset(row[0] for row in rows if mark and len(set(row[1:])) > 1)
    return Table(title, ("", *(run.name for run in runs)), rows, differ)


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Return a configuration as name -> text: {"model": {"bytes": 8}} as {"model.bytes": "8"}."""
    if isinstance(value, dict) and value:
        pairs = (flat(v, f"{name}.{k}" if name else str(k)) for k, v in value.items())
        return {k: v for pair in pairs for k, v in pair.items()}
    if name in ("hosts", "accelerators") and isinstance(value, list):
        counted = dict.fromkeys(map(_text, value), 0)
        for one in value:
            counted[_text(one)] += 1
        text = ", ".join(f"{k} (x{n})" for k, n in counted.items())
    elif name == "command" and isinstance(value, list):
        text = shlex.join(map(str, value))
    else:
        text = _text(value)
    text = printable(text)
    return {printable(name): text if len(text) <= LONG else f"{text[:LONG]}…"}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def epochs(run: Run) -> Table | None:
    """Return the epochs of a run: all of them, or some of very many."""
    if not run.epochs:
        return None
    metrics = list(dict.fromkeys(name for e in run.epochs for name in e.metrics))
    some, note = run.epochs, ""
    if len(some) > ROWS:
        places = np.unique(np.linspace(0, len(some) - 1, ROWS).round().astype(int))
        some = [some[i] for i in places]
        note = f"{len(some)} of {len(run.epochs):,}; metrics.jsonl has all."
    head = ("epoch", "updates", "loss", *(f"test {m}" for m in metrics), "seconds", "samples / s")
    rows = tuple(
        (
            str(e.epoch),
            str(e.steps),
            short(e.loss, 5),
            *(short(e.metrics[m], 5) if m in e.metrics else MISSING for m in metrics),
            short(e.seconds),
            short(e.samples_per_second),
        )
        for e in some
    )
    return Table("Epochs", head, rows, note=note, run=run.name)


def phases(run: Run) -> Table | None:
    """Return the seconds of each rank by phase."""
    found = run.phases()
    if not found:
        return None
    hosts = run.config.get("hosts")
    hosts = hosts if isinstance(hosts, list) else []
    rows = tuple(
        (
            str(rank),
            printable(str(hosts[rank])) if rank < len(hosts) else MISSING,
            *(short(float(found[p][rank])) for p in PHASES),
        )
        for rank in range(len(found["compute"]))
    )
    return Table("Seconds of each rank", ("rank", "host", *PHASES), rows, run=run.name)


def batches(run: Run) -> Table | None:
    """Return what other batch sizes would cost, by the noise scale."""
    scale = noise.of(run)
    if scale is None:
        return None
    rows = tuple(
        (
            short(factor * scale.batch) + " (now)" * (factor == 1),
            f"{scale.updates(factor):.2f}",
            f"{scale.samples(factor):.2f}",
        )
        for factor in FACTORS
        if factor * scale.batch >= 1
    )
    head = ("batch", "updates", "samples")
    return Table("Other batch sizes, to the same loss, relative to now", head, rows, run=run.name)
