"""Figures of where the time goes: by phase, rank and step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mpidl.clock import PHASES
from mpidl.report import style
from mpidl.report.drawing import Entry, percent, sheet, short, thin, time_unit, updates
from mpidl.report.run import OWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.drawing import Figure
    from mpidl.report.run import Run

FAR = 8  # bars shorter by this factor than another run's get an axis of their own
BARS = 48  # with more ranks bars touch each other
ROWS, COLUMNS = 128, 320  # cells of a heat map at most: ranks, and parts of the run
BLOCKS = [Entry(p, style.VARIABLES[style.PHASE_COLOURS[p]], "block") for p in PHASES]


def by_rank(run: Run, prefix: str, limit: float) -> Figure | None:
    """Return a step's time on each rank by phase, as stacked bars on an axis up to `limit`."""
    found = step_times(run)
    if not found:
        return None
    own = np.sum([found[p] for p in OWN], axis=0)
    longest = float(np.sum(list(found.values()), axis=0).max()) or 1e-9
    scaled = longest >= limit / FAR
    top = limit if scaled else longest
    unit, name = time_unit(top)
    ranks = len(found["compute"])
    edges = np.arange(ranks + 1) - 0.5
    with sheet("Time of a step by rank", "rank", f"time of a step ({name})") as made:
        below = np.zeros(ranks)
        for phase in PHASES:
            above = below + found[phase] / unit
            color = style.PHASE_COLOURS[phase]
            if ranks <= BARS:
                made.panel.bar(
                    range(ranks), above - below, 0.86 if ranks > 1 else 0.4, below,
                    color=color, edgecolor=style.PAPER, linewidth=0.5,
                )  # fmt: skip
            else:
                made.panel.stairs(above, edges, baseline=below, fill=True, color=color)
            below = above
        made.panel.grid(axis="x", visible=False)
        made.panel.set_xlim(min(-0.6, -0.5 * (ranks > 1)), max(ranks - 0.4, 0.6))
        made.panel.set_ylim(0, 1.02 * top / unit)
        _whole(made.panel.xaxis)
        made.legend = BLOCKS
        total = sum(values.sum() for values in found.values()) or math.nan
        shares = ", ".join(f"{p} {percent(found[p].sum() / total)}" for p in PHASES)
        says = f"Of all ranks' time: {shares}. Rank {own.argmax()} has most work of its own."
        note = "Mean of all steps. Where one rank computes longer, the others wait."
        if not scaled:
            note += " Mind the axis: it is not that of the other run."
        return made.done(prefix, says, note, run.name)


def by_step(run: Run, prefix: str) -> Figure | None:
    """Return the time of a step by phase over the run, on rank 0."""
    steps = [s for s in run.steps if s.seconds]
    if not steps:
        return None
    each = {p: np.nan_to_num([s.seconds.get(p, 0.0) for s in steps]) for p in PHASES}
    x = np.array([s.step for s in steps], float)
    whole = np.sum(list(each.values()), axis=0)
    unit, name = time_unit(float(np.median(whole)) * 3)
    with sheet("Time of a step", "updates", f"time of a step ({name})") as made:
        kept = np.isin(x, thin(x, whole)[0])
        edges = np.array([max(0, steps[0].step - steps[0].count), *x[kept]])
        sums = np.cumsum([each[p][kept] / unit for p in PHASES], axis=0)
        for phase, low, high in zip(PHASES, (0 * sums[0], *sums), sums, strict=False):
            color = style.PHASE_COLOURS[phase]
            made.panel.stairs(high, edges, baseline=low, fill=True, color=color)
        updates(made.panel, [run])
        # one step in a hundred may be far longer: it is not to hide the others
        made.panel.set_ylim(0, 1.15 * float(np.quantile(sums[-1], 0.98)) or None)
        made.legend = BLOCKS
        says = f"The median is {short(float(np.median(whole)) / unit)} {name}."
        note = "Rank 0's mean over some steps each. A hundredth of them may leave the frame."
        return made.done(prefix, says, note, run.name)


def heat(run: Run, prefix: str) -> Figure | None:
    """Return the own work of each rank in each part of the run, as a heat map."""
    grid, rows, last = work(run)
    if not grid.size or np.isnan(grid).all():
        return None
    low, high = float(np.nanmin(grid)), float(np.nanquantile(grid, 0.995))
    if high < 1.02 * low or high <= 0:  # no colours for what is noise
        low, high = 0.99 * low, 1.01 * low + 1e-9
    unit, name = time_unit(high)
    low, high = low / unit, high / unit
    ranks = rows * grid.shape[0]
    with sheet("Work of each rank", "updates", "rank") as made:
        shown = {"cmap": style.HEAT, "aspect": "auto", "interpolation": "none"}
        made.panel.imshow(
            grid / unit, vmin=low, vmax=high, **shown,
            extent=(0, last, ranks - 0.5, -0.5),
        )  # fmt: skip
        made.panel.grid(visible=False)
        updates(made.panel, [])
        made.panel.set_xlim(0, last)
        _whole(made.panel.yaxis)
        bar = made.panel.inset_axes((1.04, 0.0, 0.035, 1.0))
        scale = np.linspace(high, low, 64)[:, None]
        bar.imshow(scale, **shown, extent=(0, 1, low, high))
        bar.grid(visible=False)
        bar.set_xticks([])
        bar.yaxis.tick_right()
        bar.yaxis.set_label_position("right")
        bar.set_ylabel(f"own work of a step ({name})")
        there = ~np.isnan(grid)
        slow = np.nansum(grid, axis=1) / np.maximum(there.sum(axis=1), 1)
        i = int(slow.argmax()) * rows
        who = f"rank {i}" if rows == 1 else f"ranks {i} to {min(i + rows, ranks) - 1}"
        says = f"Most work: {who}, {short(float(slow.max()) / unit)} {name} a step; "
        says += f"the mean of all is {short(float(np.nanmean(grid)) / unit)} {name}."
        note = "Compute, data and update, without waiting. A bright row is a slow rank, a bright "
        note += "column a slow moment of all."
        if rows > 1:
            note += f" Each row is the slowest of {rows} ranks."
        return made.done(prefix, says, note, run.name)


def work(run: Run) -> tuple[np.ndarray, int, int]:
    """Return seconds of own work a step (rows, columns), ranks in a row, and the last step."""
    spans = []
    for times in run.times:
        own = np.sum([times.seconds[p] for p in OWN if p in times.seconds], axis=0)
        if np.ndim(own) == 2:
            spans.append((times.first_step, times.steps_per_column, own))
    if not spans:
        return np.empty((0, 0)), 1, 0
    ranks = max(len(own) for *_, own in spans)
    ends = {e.epoch: e.steps for e in run.epochs}
    last = max(first + own.shape[1] * each for first, each, own in spans)
    last = min(last, ends.get(run.times[-1].epoch, last)) or 1
    rows = -(-ranks // ROWS)
    smallest = min(each for _, each, _ in spans)
    columns = max(1, min(COLUMNS, -(-last // smallest)))
    grid = np.full((-(-ranks // rows) * rows, columns), np.nan)
    for first, each, own in spans:
        for j in range(own.shape[1]):
            begin = int((first + j * each) * columns / last)
            end = max(begin + 1, math.ceil((first + (j + 1) * each) * columns / last))
            cells = grid[: len(own), begin:end]
            np.fmax(cells, own[:, j : j + 1], out=cells)
    folded = grid.reshape(-1, rows, columns)
    return np.fmax.reduce(folded, axis=1), rows, last


def step_times(run: Run) -> dict[str, np.ndarray]:
    """Return seconds a step, the mean of the run, of each rank (ranks,) by phase."""
    updates = run.updates()
    found = run.phases()
    return {p: v / updates for p, v in found.items()} if updates > 0 else {}


def top(runs: Sequence[Run]) -> float:
    """Return the longest step of any rank, in seconds, for bars that compare."""
    sums = [np.sum(list(p.values()), axis=0).max() for run in runs if (p := step_times(run))]
    return float(max([1e-9, *sums]))


def _whole(axis: object) -> None:
    locator = style.library("matplotlib.ticker").MaxNLocator(8, integer=True, min_n_ticks=1)
    axis.set_major_locator(locator)  # type: ignore[attr-defined]
