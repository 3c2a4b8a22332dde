"""Throughput over ranks, of runs that differ in nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from mpidl.report import style
from mpidl.report.drawing import entry, finite, sheet, short
from mpidl.report.values import number, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.drawing import Figure
    from mpidl.report.run import Run

#: What a config says of where and when a run was, and how long: not of what a step computes.
PLACE = (
    "started", "command", "ranks", "nodes", "hosts", "ranks_on_node", "mpi", "versions", "cpu",
    "cores", "threads", "accelerators", "epochs", "seed", "out", "checkpoint",
)  # fmt: skip
AVERAGE = ("strategy", "codec")


def rate(run: Run) -> float:
    """Return the median samples a second of a run's epochs, or else of its steps; NaN for none."""
    epochs = finite([e.samples_per_second for e in run.epochs])
    every = epochs or finite([s.samples_per_second for s in run.steps])
    return float(np.median(every)) if every else float("nan")


def groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Return runs that scale: strong, with one global batch, and weak, with one on each rank.

    A run on one rank averages with nobody, so it belongs to each strategy.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        batch = number(run.config.get("batch_size"))
        if not run.ranks or not finite([rate(run)]) or not finite([batch]):
            continue
        rest = {k: v for k, v in run.config.items() if k not in (*PLACE, *AVERAGE, "batch_size")}
        same = json.dumps(rest, sort_keys=True, default=str)
        found.setdefault((f"batch {short(batch)}", same), []).append(run)
        found.setdefault((f"{short(batch / run.ranks)} a rank", same), []).append(run)
    scale = []
    for (kind, _), every in found.items():
        alone = [run for run in every if run.ranks == 1]
        others = [run for run in every if run.ranks > 1]
        ways = dict.fromkeys(map(_way, others))
        for way in ways:
            some = sorted([*alone, *(r for r in others if _way(r) == way)], key=lambda r: r.ranks)
            if some[0].ranks < some[-1].ranks:
                scale.append((f"{way}, {kind}" if len(ways) > 1 else kind, some))
    return scale


def _way(run: Run) -> str:
    """Return how a run averages."""
    some = (run.config.get(name) for name in AVERAGE)
    return printable(" ".join(str(one) for one in some if one is not None))


def figure(runs: Sequence[Run]) -> Figure | None:
    """Return samples a second over ranks, beside what the smallest run would give on more."""
    found = groups(runs)
    if not found:
        return None
    with sheet("Scaling", "ranks", "samples / s") as made:
        says = []
        for i, (kind, some) in enumerate(found):
            ranks = sorted({run.ranks for run in some})
            rates = [float(np.median([rate(r) for r in some if r.ranks == n])) for n in ranks]
            ideal = [rates[0] / ranks[0] * n for n in ranks]
            made.panel.plot(ranks, ideal, color=style.look(i)["color"], linestyle=":")
            made.panel.plot(ranks, rates, **style.look(i))
            made.legend += [
                entry(kind, i),
                entry(f"{kind}, ideal", i, "dots", marked=False),
            ]
            share = 100 * rates[-1] / ideal[-1]
            says.append(
                f"{kind}: {short(rates[0])} samples per second on {ranks[0]} ranks, "
                f"{short(rates[-1])} on {ranks[-1]}, {share:.0f} % of the ideal"
            )
        every = sorted({run.ranks for _, some in found for run in some})
        if every[-1] >= 8 * every[0]:
            made.panel.set_xscale("log", base=2)
            made.panel.set_yscale("log", base=2)
            made.panel.minorticks_off()
        else:
            made.panel.set_xlim(0, every[-1] * 1.05)
            made.panel.set_ylim(bottom=0)
        made.panel.set_xticks(every, list(map(str, every)))
        style.counts(made.panel.yaxis)
        note = "The median of all epochs. The ideal: each further rank adds what the first gave."
        return made.done("scaling", "; ".join(says) + ".", note)
