"""What the figures of a page share: their form, lines of any length, units."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.report import style
from mpidl.report.svg import inline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpidl.report.run import Run

POINTS = 400  # of a line: more than a screen shows
WIDTH, HEIGHT = 400 / 72, 260 / 72  # inches: a unit of the SVG is a pixel where there is room
TALL = 20.0  # a loss that falls by more than this factor gets a logarithmic axis


@dataclass(frozen=True)
class Entry:
    """A line of a legend."""

    label: str
    colour: str  #: a variable of the page
    kind: str = "line"  #: or "dash", "dots", "faint", "block"
    marker: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    title: str
    svg: str
    note: str  #: how to read it
    legend: tuple[Entry, ...] = ()
    run: str = ""  #: whose it is, where each has its own


def entry(label: str, i: int, kind: str = "line", *, marked: bool = True) -> Entry:
    """Return the legend's line for the series `i` of `style.look`."""
    look = style.look(i)
    return Entry(label, style.VARIABLES[look["color"]], kind, look["marker"] if marked else "")


class Sheet:
    """An empty plot; `done` makes the Figure of it."""

    def __init__(self, title: str, x: str, y: str, height: float = HEIGHT) -> None:
        self.title = title
        self.figure, self.panel = style.figure(1, WIDTH, height)
        self.panel.set_xlabel(x)
        self.panel.set_ylabel(y, parse_math=False)
        self.legend: list[Entry] = []

    def done(self, prefix: str, says: str, note: str, run: str = "") -> Figure:
        """Return the figure; `says` is what there is to see, and `note` how to read it."""
        svg = inline(self.figure, prefix, f"{self.title}{f' of {run}' * bool(run)}. {says}")
        return Figure(self.title, svg, note, tuple(self.legend), run)


@contextmanager
def sheet(title: str, x: str, y: str, height: float = HEIGHT) -> Iterator[Sheet]:
    """Draw a plot in the style of all."""
    with style.styled():
        yield Sheet(title, x, y, height)


def plot(panel: Any, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """Draw a line of any number of points, with some markers, and gaps where `y` is no number."""
    px, py = thin(np.asarray(x, float), np.asarray(y, float))
    options.setdefault("markevery", max(1, len(px) // 8))
    panel.plot(px, py, **options)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return `x` and `y` (n,) with at most `points` of them, of which peaks are kept."""
    y = np.where(np.isfinite(y), y, np.nan)
    if len(x) <= points:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), points // 2 - 1):
        if not np.isnan(y[part]).all():
            keep |= {int(part[np.nanargmin(y[part])]), int(part[np.nanargmax(y[part])])}
        else:
            keep.add(int(part[0]))
    some = sorted(keep)
    return x[some], y[some]


def finite(values: Sequence[float]) -> list[float]:
    """Return those that are numbers."""
    return [v for v in values if math.isfinite(v)]


def logarithmic(panel: Any, values: Sequence[float]) -> None:
    """Give `panel` a logarithmic y axis where the positive `values` differ much."""
    good = finite(values)
    if not good or min(good) <= 0 or max(good) < TALL * min(good):
        return
    ticker = style.library("matplotlib.ticker")
    subs = (1, 2, 5) if max(good) < 300 * min(good) else (1,)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: short(v)))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def updates(panel: Any, runs: Sequence[Run]) -> None:
    """Set an x axis of updates, which begins at 0 and has whole numbers."""
    ticker = style.library("matplotlib.ticker")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    style.counts(panel.xaxis)
    ends = [e.steps for run in runs for e in run.epochs[-1:]]
    ends += [s.step for run in runs for s in run.steps[-1:]]
    panel.set_xlim(0, 1.02 * max([1, *ends]))


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit to show times up to `seconds` in: its seconds, and its name."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= 2 * size:
            return size, name
    return 1e-6, "µs"


def short(value: float, digits: int = 4) -> str:
    """Return a number with a few digits, and thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.{digits - 1}g}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Return a time as people write it: 350 ms, 12.3 s, 4 min 5 s, 3 h 20 min."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Return bytes as people write them: 3.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.3g} %" if math.isfinite(share) else str(share)
