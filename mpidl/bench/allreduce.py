"""`mpidl bench allreduce`: every strategy, MPI, Gloo and Horovod against the memory's speed."""

from __future__ import annotations

import re
from typing import Any

from mpidl.bench import jobs
from mpidl.errors import InvalidArgument

SIZES = "4KiB,1MiB,64MiB"
TURNS = 25
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def run(ranks: int, sizes: list[int], turns: int = TURNS) -> dict[str, Any]:
    """Return {"machine", "rows": one for each method and size, "absent": {method: why}}."""
    return jobs.run("mpidl.bench.allreduce_ranks", ranks, sizes=sizes, turns=turns)


def parse_sizes(text: str) -> list[int]:
    """Return the bytes that "4KiB,1MiB" means. Raises InvalidArgument."""
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(\w*)\s*", word)
        if found is None or found[2] not in UNITS:
            units = ", ".join(filter(None, UNITS))
            raise InvalidArgument(f"size {word!r}: expected a number and one of {units}")
        size = int(found[1]) * UNITS[found[2]]
        if size < 4 or size % 4:
            raise InvalidArgument(f"size {word!r}: expected a multiple of 4 bytes, a float32")
        sizes.append(size)
    return sizes


def write_size(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that it is a whole number of."""
    unit = max((u for u in UNITS if u and nbytes % UNITS[u] == 0), key=lambda u: UNITS[u])
    return f"{nbytes // UNITS[unit]} {unit}"


def show(report: dict[str, Any]) -> None:
    """Print one table for each size, the quickest method first."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = report["rows"]
    for nbytes in dict.fromkeys(row["bytes"] for row in rows):
        here = sorted((r for r in rows if r["bytes"] == nbytes), key=lambda r: r["median_s"])
        bound = next(r["median_s"] for r in here if r["method"] == "memory_bound")
        title = f"{write_size(nbytes)} of float32, {here[0]['ranks']} ranks"
        table = Table(title=title, caption="us: median and quartiles; bound: memory_bound / median")
        for name in ("method", "what"):
            table.add_column(name)
        for name in ("us", "25 %", "75 %", "GB/s", "bound"):
            table.add_column(name, justify="right")
        for row in here:
            times = (f"{row[key] * 1e6:,.1f}" for key in ("median_s", "low_s", "high_s"))
            speed = f"{row['gb_per_s']:.2f}" if row["gb_per_s"] >= 1 else f"{row['gb_per_s']:.2g}"
            share = f"{bound / row['median_s']:.2f}"
            table.add_row(row["method"], row["what"], *times, speed, share)
        console.print(table)
    show_absent(console, report)


def show_absent(console: Any, report: dict[str, Any]) -> None:
    """Say which methods could not run here, and why, in one line."""
    if report["absent"]:
        reasons = "; ".join(f"{name} ({why})" for name, why in report["absent"].items())
        console.print(f"not measured: {reasons}")
