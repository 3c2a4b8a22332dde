"""`mpidl bench stragglers`: one slow rank, and what it costs the others."""

from __future__ import annotations

from typing import Any

from mpidl.bench import jobs
from mpidl.errors import InvalidArgument

STEPS, SLOW_DOWN, STALENESS = 100, 5.0, 4


def run(
    ranks: int, slow_down: float = SLOW_DOWN, steps: int = STEPS, staleness: int = STALENESS
) -> dict[str, Any]:
    """Return {"machine", "rows"}: see `stragglers_ranks.measure`."""
    if ranks < 2:
        raise InvalidArgument(f"-n {ranks}: expected 2 ranks or more, one of them slow")
    return jobs.run(
        "mpidl.bench.stragglers_ranks",
        ranks,
        steps=steps,
        slow_down=slow_down,
        staleness=staleness,
    )


def show(report: dict[str, Any]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    first = report["rows"][0]
    table = Table(title=f"{first['ranks']} ranks, one of them {first['slow_down']:g} x slower")
    table.caption = "steps a second of the others"
    for i, name in enumerate(("method", "without it", "beside it", "kept")):
        table.add_column(name, justify="right" if i else "left")
    for row in report["rows"]:
        table.add_row(
            row["method"],
            f"{row['steps_per_s']:.1f}",
            f"{row['steps_per_s_beside_a_slow_rank']:.1f}",
            f"{row['kept']:.2f}",
        )
    Console().print(table)
