"""`mpidl bench trace`: what recording a trace adds to a step."""

from __future__ import annotations

from typing import Any

from mpidl.bench import jobs

TURNS = 40


def run(ranks: int, turns: int = TURNS) -> dict[str, Any]:
    """Return {"machine", "rows", "nanoseconds"}: see `trace_ranks.measure`."""
    return jobs.run("mpidl.bench.trace_ranks", ranks, turns=turns)


def show(report: dict[str, Any]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    first = report["rows"][0]
    table = Table(title=f"steps of an MLP on {first['ranks']} ranks, with and without a trace")
    names = ("samples", "without, ms", "with", "over", "quartiles", "by parts", "events")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            str(row["samples"]),
            f"{row['off_ms']:.3f}",
            f"{row['on_ms']:.3f}",
            f"{row['over']:.4f}",
            f"{row['low']:.3f}-{row['high']:.3f}",
            f"{row['by_parts']:.4f}",
            f"{row['events']:.1f}",
        )
    table.caption = ", ".join(f"{k}: {v:.0f} ns" for k, v in report["nanoseconds"].items())
    Console(width=80).print(table)
