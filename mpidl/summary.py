"""The last lines of a fit: where the time went, and what stands out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from mpidl import advice, noise
from mpidl.clock import OTHER, PHASES
from mpidl.progress import duration

if TYPE_CHECKING:
    from mpidl.parallel import DataParallel
    from mpidl.progress import Progress
    from mpidl.run_folder import RunFolder
    from mpidl.times import Totals

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def tell(totals: Totals, replica: DataParallel, folder: RunFolder | None, shown: Progress) -> None:
    """Show the summary, and write summary.json. On rank 0."""
    config = {} if folder is None else folder.config
    if config.get("ranks") != replica.world.size:  # ranks have died, or joined
        places = "hosts", "cores", "ranks_on_node"
        config = {name: value for name, value in config.items() if name not in places}
    found = make(totals, replica, config)
    shown.line(table(found))
    if folder is not None:
        folder.write_summary(found)


def make(totals: Totals, replica: DataParallel, config: dict[str, Any]) -> dict[str, Any]:
    """Return what summary.json holds."""
    sizes = [(replica.strategy.owned(f.param.size), f.param.size) for f in replica.buckets]
    owns_parts = any(part != slice(0, size) for part, size in sizes)
    found = totals.summary(owns_parts=owns_parts)
    return {**found, "advice": advice.of(found, config), "noise": replica.noise.record()}


def amount(nbytes: float) -> str:
    """Return "12.3 MB"."""
    unit = 0
    while nbytes >= 999.5 and unit < len(UNITS) - 1:
        nbytes, unit = nbytes / 1000, unit + 1
    return f"{nbytes:.3g} {UNITS[unit]}" if unit else f"{nbytes:.0f} {UNITS[0]}"


def table(summary: dict[str, Any]) -> str:
    """Return what summary.json holds as a few lines of at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    phases, ranks, steps = summary["phases"], summary["ranks"], summary["steps"]
    names = PHASES[:OTHER]
    training = sum(sum(phases[name]) for name in names) or 1.0
    # ASCII, for it goes to log files, too
    grid = Table(box=None, pad_edge=False, collapse_padding=True)
    grid.add_column("ms a step")
    for name in names:
        grid.add_column(name, justify="right")
    step = 1000 / max(1, steps)
    each = [[phases[name][rank] * step for name in names] for rank in range(ranks)]
    means = [sum(column) / ranks for column in zip(*each, strict=True)]
    grid.add_row("mean of ranks" if ranks > 1 else "rank 0", *map(_number, means))
    if ranks > 1:
        slowest = summary["slowest"]
        grid.add_row(f"rank {slowest}, the slowest", *map(_number, each[slowest]))
    grid.add_row("share", *(f"{sum(phases[name]) / training:.0%}" for name in names))
    text = io.StringIO()
    console = Console(file=text, width=80, no_color=True, force_terminal=False)
    many = "" if ranks == 1 else f" on {ranks} ranks"
    console.print(f"{steps:,} steps in {_spent(summary['seconds'])}{many}", highlight=False)
    console.print(grid)
    memory = f"peak memory {amount(max(summary['peak_memory_bytes']))}"
    if ranks > 1:
        moved = amount(summary["moved_bytes"] / max(1, steps))
        speed = f"speed {summary['efficiency']:.0%} of {ranks} single ranks"
        memory = f"{speed}, {moved} moved a step, {memory} a rank"
    console.print(memory, highlight=False)
    for line in noise.advice(summary.get("noise"))[:1]:
        console.print(line, highlight=False, markup=False)
    for line in summary["advice"][:1]:
        console.print(f"advice: {line}", highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _spent(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"
