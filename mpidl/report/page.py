"""One HTML page of run folders: no script, nothing fetched. Needs matplotlib and jinja2."""

from __future__ import annotations

import importlib
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.errors import MpidlError
from mpidl.report import curves, noise, phases, scaling, style, tables
from mpidl.report.values import mapping, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.drawing import Figure
    from mpidl.report.run import Run
    from mpidl.report.tables import Table

HERE = Path(__file__).parent
ABOVE = ("state", "ranks", "epochs", "training loss", "samples / s", "efficiency",
         "time in training steps", "waiting for other ranks", "critical batch")  # fmt: skip
TILES = 8


def check() -> None:
    """Raise MpidlError where matplotlib or jinja2 is not installed."""
    _jinja()
    style.library()


def _jinja() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise MpidlError("a report needs jinja2: pip install 'mpidl[report]'") from error


def page(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several side by side."""
    environment = _jinja().Environment(
        loader=_jinja().FileSystemLoader(HERE),
        autoescape=True,
        undefined=_jinja().StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    from mpidl import __version__

    facts = [tables.facts(run) for run in runs]
    configs = [tables.flat(run.config) if run.config else {} for run in runs]
    text: str = environment.get_template("page.html").render(
        runs=runs,
        describe=_describe,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        title=", ".join(run.name for run in runs),
        version=__version__,
        tiles=_tiles(facts[0]) if len(runs) == 1 else {},
        facts=tables.beside("Results", runs, facts, mark=False),
        sections=_sections(runs),
        config=tables.beside("Configuration and environment", runs, configs),
        details=_details(runs),
        advice=_advice(runs),
        notes=_notes(runs),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        light={name: colour for colour, name in style.VARIABLES.items()},
        dark={name: style.DARK[colour] for colour, name in style.VARIABLES.items()},
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def _describe(run: Run) -> str:
    """Return in a line what ran, when and where."""
    given = tables.flat(run.config) if run.config else {}
    strategy, codec = given.get("strategy"), given.get("codec", "null")
    parts = [
        f"started {_moment(given['started'])}" if "started" in given else "",
        f"{run.ranks} rank{'s' * (run.ranks != 1)}" if run.ranks else "",
        f"on {hosts}" if (hosts := given.get("hosts")) and len(hosts) < 120 else "",
        f"strategy {strategy}{f' with {codec}' * (codec != 'null')}" if strategy else "",
        f"batch {given['batch_size']}" if "batch_size" in given else "",
        given.get("command", ""),
    ]
    return ", ".join(part for part in parts if part) or str(printable(str(run.path)))


def _moment(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _tiles(facts: dict[str, str]) -> dict[str, str]:
    tests = [k for k in facts if k.startswith("test ")]
    names = [*ABOVE[:4], *tests[:2], *ABOVE[4:]]
    return {name: facts[name] for name in names if name in facts and len(facts[name]) < 40}


def _sections(runs: Sequence[Run]) -> list[tuple[str, list[Figure], list[Table]]]:
    """Return (title, figures, tables) of each section that has any."""
    limit = phases.top(runs)
    where: list[Figure | None] = []
    for i, run in enumerate(runs):
        where += [phases.by_rank(run, f"ranks{i}", limit), phases.heat(run, f"heat{i}")]
    single = phases.by_step(runs[0], "steps") if len(runs) == 1 else None
    found: list[tuple[str, list[Figure | None], list[Table | None]]] = [
        ("What it learns", [*curves.learning(runs)], []),
        ("How fast", [curves.throughput(runs), scaling.figure(runs), single], []),
        ("Where the time goes", where, []),
        ("Which batch size", [noise.figure(runs)], [tables.batches(run) for run in runs]),
    ]
    some = (
        (name, [f for f in figures if f is not None], [t for t in below if t is not None])
        for name, figures, below in found
    )
    return [(name, figures, below) for name, figures, below in some if figures or below]


def _details(runs: Sequence[Run]) -> list[Table]:
    found = (make(run) for make in (tables.epochs, tables.phases) for run in runs)
    return [table for table in found if table is not None]


def _advice(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    found = []
    for run in runs:
        given = run.summary.get("advice")
        lines = [printable(str(one)) for one in given] if isinstance(given, list) else []
        if (scale := noise.of(run)) is not None:
            lines.append(scale.advice())
        if lines:
            found.append((run.name, lines))
    return found


def _notes(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        for name, count in run.damaged.items():
            lines = f"{count} line{'s' * (count > 1)}"
            found.append(f"{run.name}: {lines} of {printable(name)} cannot be read.")
        if not run.epochs:
            found.append(f"{run.name}: no epoch is over yet.")
        elif not run.phases():
            found.append(f"{run.name}: the run wrote no times of its ranks.")
        if not mapping(run.config):
            found.append(f"{run.name}: config.json is missing, or cannot be read.")
    return found
