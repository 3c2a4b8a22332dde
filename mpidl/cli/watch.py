"""`mpidl watch`: how a run goes, on the terminal of a login node, from its folder alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpidl.cli import runs
from mpidl.errors import InvalidArgument
from mpidl.report.run import Run
from mpidl.report.values import printable

if TYPE_CHECKING:
    from rich.console import Console

ENDS = {"finished": 0, "stopped": 0, "failed": 1}  # exit statuses
COLUMNS = 80  # of a picture that goes to a file


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name in runs/.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one picture, and end.")] = False,
) -> None:
    """Draw loss, throughput and the phases of the ranks while a run goes on.

    Reads the run folder only, so it works from any node that sees it. Ends when the run has ended,
    with status 1 if it failed. Without a terminal: a line for each change.

    Example: mpidl watch --every 5 runs/train
    """
    folder = runs.find(run) or Path(run)
    waits = runs.read(folder) is not None  # submitted, and not begun
    found = _open(folder, waits=waits)
    from rich.console import Console

    console = Console(highlight=False)
    try:
        if once:
            width = console.width if console.is_terminal else COLUMNS
            _picture(console, _begun(folder, found, every), width, lines=None)
            return
        if console.is_terminal:
            found = _live(console, _begun(folder, found, every), every)
        else:
            found = _lines(_begun(folder, found, every), every)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(ENDS.get(str(found.state.get("state")), 0))


def _open(folder: Path, *, waits: bool) -> Run | None:
    try:
        return Run(folder)
    except InvalidArgument as error:
        if waits:
            return None
        print(f"mpidl: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _begun(folder: Path, found: Run | None, every: float) -> Run:
    """Return the run; wait for one that was submitted."""
    if found is None:
        print(f"{printable(str(folder))}: submitted, and not begun", flush=True)
    while found is None:
        time.sleep(every)
        found = _open(folder, waits=True)
    return found


def ended(run: Run) -> bool:
    """Whether a run says that it has."""
    return run.state.get("state") in ENDS


def _picture(console: Console, run: Run, width: int, lines: int | None) -> None:
    from mpidl.cli.watch_picture import picture

    console.print(picture(run, width, lines, plain=_plain(console)), soft_wrap=True)


def _plain(console: Console) -> bool:
    """Whether only ASCII can be shown."""
    return not console.encoding.lower().startswith("utf")


def _live(console: Console, run: Run, every: float) -> Run:
    from rich.live import Live

    from mpidl.cli.watch_picture import picture

    def now() -> object:
        return picture(run, console.width, console.height - 1, plain=_plain(console))

    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(now(), refresh=True)  # type: ignore[arg-type]
            if ended(run):
                return run
            time.sleep(every)
            run.look()


def _lines(run: Run, every: float) -> Run:
    from mpidl.cli.watch_picture import line

    before = None
    while True:
        text = line(run)
        if text != before:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        if ended(run):
            return run
        before = text
        time.sleep(every)
        run.look()
