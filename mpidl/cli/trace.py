"""`mpidl trace`: what becomes of the traces that `mpidl run --trace` makes."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpidl import config
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.trace import analysis, load, parts
from mpidl.trace import merge as merging

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(no_args_is_help=True, help="Look into a trace of mpidl run --trace.")

WIDTH = 78
STEPS, RANGES = 10, 10  # that are shown
File = Annotated[Path, typer.Argument(metavar="FILE", help="Such as trace.json.")]


@app.command()
def summary(
    file: File,
    steps: Annotated[int, typer.Option(min=0, help="Show so many, the longest.")] = STEPS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell which rank each step waited for, and why; and what the critical path consists of.

    For the longest steps: the rank that came last to the average, how late (after the median of
    the others), and the phase or the range in which it had spent more than they. Then all steps.

    Example: mpidl trace summary trace.json --steps 5
    """
    try:
        processes, notes = load.load(file)
    except MpidlError as error:
        _refuse(error)
    report = {**analysis.report(processes, steps), "notes": notes}
    print(json.dumps(report) if as_json else "\n".join(lines(report)))


@app.command()
def merge(file: File) -> None:
    """Make a trace of the parts that ranks have left beside it, as after a crash.

    Example: mpidl trace merge trace.json
    """
    try:
        notes = merging.merge(file)
    except (MpidlError, OSError) as error:
        _refuse(error)
    for note in notes:
        print(clean(note))


def _refuse(error: Exception) -> None:
    print(f"mpidl: {clean(str(error))}", file=sys.stderr)
    raise typer.Exit(2) from None


def settings(file: Path | None) -> dict[str, str]:
    """Return the environment in which ranks record; by default into trace.json.

    In the folder of a job (MPIDL_OUT), if there is one. Raises InvalidArgument.
    """
    path = (file or Path(config.job_folder() or "") / "trace.json").absolute()
    if path.is_dir() or not path.name:
        raise InvalidArgument(f"--trace-file {path}: expected a file, and that is a folder")
    return {"MPIDL_TRACE": str(path), "MPIDL_TRACE_RUN": os.urandom(8).hex()}


def finish(found: dict[str, str]) -> None:
    """Merge what ranks have left here that came to no good end, and tell."""
    if "MPIDL_TRACE" not in found:
        return
    path, run = Path(found["MPIDL_TRACE"]), found["MPIDL_TRACE_RUN"]
    with suppress(OSError, MpidlError):
        if parts.of(path, run):
            for note in merging.merge(path, run):
                print(f"mpidl: trace: {clean(note)}", file=sys.stderr)


def lines(report: dict[str, Any]) -> list[str]:
    """Return the text, in at most 80 columns."""
    found = report["totals"]
    ranks = len(report["ranks"])
    head = f"{found['steps']} steps on {ranks} rank{'s' * (ranks != 1)} in {found['seconds']:.3g} s"
    shown = [head, *(clean(f"note: {note}") for note in report["notes"]), ""]
    short = _short(report["ranks"])
    rows: list[tuple[str, ...]]
    if report["worst"]:
        shown += ["The longest steps, in ms (late: after the median of the others)"]
        rows = [("step", "took", "last", "late", "because", "more", "wait", "reduce", "update")]
        rows += [
            (
                str(step["step"]),
                milli(step["seconds"]),
                short.get(step["last"], ""),
                milli(step["late"]) if step["last"] else "",
                step["because"],
                milli(step["seconds_more"]) if step["last"] else "",
                *(milli(step[name]) for name in ("wait", "reduce", "update")),
            )
            for step in report["worst"]
        ]
        shown += [*table(rows, left=(2, 4)), ""]
    rows = [("critical path", "seconds", "share")]
    rows += [
        (name, f"{one['seconds']:.3f}", f"{one['share']:.1%}")
        for name, one in found["path"].items()
    ]
    shown += table(rows)
    if ranks > 1 and found["steps"]:
        rows = [("last to the average", "steps", "seconds that the others waited for it")]
        rows += [
            (short[one["rank"]], str(one["last"]), f"{one['seconds']:.3f}")
            for one in found["stragglers"][:STEPS]
        ]
        shown += ["", *table(rows)]
        rows = [("because of", "seconds")]
        rows += [(name, f"{seconds:.3f}") for name, seconds in found["causes"].items()][:STEPS]
        shown += ["", *table(rows)]
    if found["ranges"]:
        rows = [("range", "calls", "seconds", "most of it", "seconds")]
        rows += [
            (
                one["name"],
                str(one["calls"]),
                f"{one['seconds']:.3f}",
                short[one["most"]],
                f"{one['most_seconds']:.3f}",
            )
            for one in found["ranges"][:RANGES]
        ]
        shown += ["", *table(rows, left=(0, 3))]
    return shown


def _short(names: Sequence[str]) -> dict[str, str]:
    """Return ranks without their host, where there is one."""
    pattern = r"(rank \d+) on (.*?)((?:, later|, attempt \d+)?)"
    found = {name: re.fullmatch(pattern, name, re.DOTALL) for name in names}
    hosts = {match[2] for match in found.values() if match}
    if len(hosts) != 1:
        return {name: name for name in names}
    return {name: match[1] + match[3] if match else name for name, match in found.items()}


def milli(seconds: float) -> str:
    """Return milliseconds, as exact as a column of six has room for."""
    value = 1e3 * seconds
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def table(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Return lines of columns; those that are `left` of their numbers are cut where it is wide."""
    from rich.cells import cell_len, set_cell_size

    texts = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        longest = max(left, key=lambda i: widths[i])
        if widths[longest] <= 8:
            break
        widths[longest] -= 1
    made = []
    for row in texts:
        cells = [
            set_cell_size(cut(cell, width), width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        made.append("  ".join(cells).rstrip())
    return made


def cut(text: str, width: int) -> str:
    """Return at most `width` columns of a terminal of it, the beginning and the end."""
    from rich.cells import cell_len, chop_cells

    if cell_len(text) <= width:
        return text
    end = width // 2
    while cell_len(text[len(text) - end :]) > width // 2:
        end -= 1
    return f"{chop_cells(text, width - width // 2 - 2)[0]}..{text[len(text) - end :]}"


def clean(text: str) -> str:
    """Return it without what would move the cursor: names are anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)
