"""Figures of what is learnt, and how fast: loss, metrics, samples a second."""

from __future__ import annotations

from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING, Any

from mpidl.report import style
from mpidl.report.drawing import (
    Entry,
    entry,
    finite,
    logarithmic,
    plot,
    sheet,
    short,
    time_unit,
    updates,
)
from mpidl.report.scaling import rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.drawing import Figure
    from mpidl.report.run import Run

METRICS = 8  # figures of metrics at most, those of most runs first


def learning(runs: Sequence[Run]) -> list[Figure]:
    """Return the figures of loss and metrics, over updates; of several runs also over time."""
    found = [_loss(runs), _over_time(runs) if len(runs) > 1 else None]
    names: dict[str, int] = {}
    for run in runs:
        for name in dict.fromkeys(name for e in run.epochs for name in e.metrics):
            names[name] = names.get(name, 0) + 1
    names.pop("loss", None)
    for i, name in enumerate(sorted(names, key=lambda n: -names[n])[:METRICS]):
        found.append(_metric(runs, name, f"metric{i}"))
    return [one for one in found if one is not None]


def _loss(runs: Sequence[Run]) -> Figure | None:
    single = len(runs) == 1
    with sheet("Loss", "updates", "loss") as made:
        every: list[float] = []
        for i, run in enumerate(runs):
            raw = [s.loss for s in run.steps]
            if finite(raw):
                look = {"color": style.look(i)["color"], "alpha": 0.35, "linewidth": 1.0}
                plot(made.panel, [s.step for s in run.steps], raw, **look, zorder=1)
                if single and len(finite(raw)) > 1:
                    made.legend.append(entry("rank 0's samples", i, "faint", marked=False))
            x, y = [e.steps for e in run.epochs], [e.loss for e in run.epochs]
            tests = [e.metrics.get("loss", float("nan")) for e in run.epochs]
            if finite(y):
                plot(made.panel, x, y, **style.look(i))
            if finite(y) or not single:
                made.legend.append(entry("training, by epoch" if single else run.name, i))
            if finite(tests):
                j = i + 1 if single else i
                plot(made.panel, x, tests, **style.look(j), linestyle="--")
                if single:
                    made.legend.append(entry("test", j, "dash"))
            every += [*raw, *y, *tests]
        if not finite(every):
            return None
        if not single:
            made.legend += [Entry("training", "ink"), Entry("test", "ink", "dash")]
        logarithmic(made.panel, every)
        updates(made.panel, runs)
        says = " ".join(_course(run, [e.loss for e in run.epochs], "training loss") for run in runs)
        note = "Mean over the samples of an epoch, each taken before its own update."
        lost = [run.name for run in runs if len(finite(_both(run))) < len(_both(run))]
        if lost:
            note += f" Gaps are losses that are no numbers ({', '.join(lost)})."
        return made.done("loss", says, note)


def _both(run: Run) -> list[float]:
    return [*(e.loss for e in run.epochs), *(s.loss for s in run.steps)]


def _over_time(runs: Sequence[Run]) -> Figure | None:
    spent = [
        list(accumulate(e.seconds if isfinite(e.seconds) else 0.0 for e in run.epochs))
        for run in runs
    ]
    ends = finite([times[-1] for times in spent if times])
    if not ends:
        return None
    unit, name = time_unit(max(ends))
    tested = all(any("loss" in e.metrics for e in run.epochs) for run in runs)
    with sheet("Loss over time", f"time in training steps ({name})", "loss") as made:
        every: list[float] = []
        for i, (run, times) in enumerate(zip(runs, spent, strict=True)):
            values = [e.metrics.get("loss", e.loss) if tested else e.loss for e in run.epochs]
            plot(made.panel, [t / unit for t in times], values, **style.look(i))
            made.legend.append(entry(run.name, i))
            every += values
        if not finite(every):
            return None
        logarithmic(made.panel, every)
        made.panel.set_xlim(left=0)
        kind = "test" if tested else "training"
        pairs = zip(runs, spent, strict=True)
        says = " ".join(f"{r.name}: {short(t[-1] / unit)} {name}." for r, t in pairs if t)
        note = f"The {kind} loss. Further left and lower is better, whatever the batch size."
        return made.done("overtime", says, note)


def _metric(runs: Sequence[Run], name: str, prefix: str) -> Figure | None:
    with sheet(name[:1].upper() + name[1:], "updates", name[:40]) as made:
        best = []
        for i, run in enumerate(runs):
            points = [(e.steps, e.metrics[name]) for e in run.epochs if name in e.metrics]
            if not finite([y for _, y in points]):
                continue
            plot(made.panel, *zip(*points, strict=True), **style.look(i))
            if len(runs) > 1:
                made.legend.append(entry(run.name, i))
            best.append(_course(run, [y for _, y in points], name))
        if not best:
            return None
        updates(made.panel, runs)
        return made.done(prefix, " ".join(best), "Of the samples held back, after each epoch.")


def throughput(runs: Sequence[Run]) -> Figure | None:
    """Return the figure of samples a second, over updates."""
    single = len(runs) == 1
    with sheet("Throughput", "updates", "samples / s") as made:
        says = []
        for i, run in enumerate(runs):
            steps = [(s.step, s.samples_per_second) for s in run.steps]
            if finite([y for _, y in steps]):
                look: dict[str, Any] = {"color": style.look(i)["color"], "alpha": 0.35}
                plot(made.panel, *zip(*steps, strict=True), **look, linewidth=1.0)
            rates = [(e.steps, e.samples_per_second) for e in run.epochs]
            if finite([y for _, y in rates]):
                plot(made.panel, *zip(*rates, strict=True), **style.look(i))
            elif not finite([y for _, y in steps]):
                continue
            if not single:
                made.legend.append(entry(run.name, i))
            says.append(_course(run, [y for _, y in rates or steps], "samples per second"))
        if not says:
            return None
        logarithmic(made.panel, [rate(run) for run in runs])
        if made.panel.get_yscale() == "linear":
            made.panel.set_ylim(bottom=0)
        style.counts(made.panel.yaxis)
        updates(made.panel, runs)
        if single and len(runs[0].steps) > 1:
            c0 = style.VARIABLES[style.SERIES[0]]
            made.legend += [Entry("some steps", c0, "faint"), entry("by epoch", 0)]
        return made.done("rate", " ".join(says), "All ranks together, in training steps.")


def _course(run: Run, values: list[float], what: str) -> str:
    """Return how `values` went, in words."""
    good = finite(values)
    if not good:
        return f"{run.name}: no {what}."
    ends = f"{what} from {short(good[0])} to {short(good[-1])}"
    return f"{run.name}: {ends}, between {short(min(good))} and {short(max(good))}."
