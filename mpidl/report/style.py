"""One style for all plots: colours, sizes, and how a figure is made. Needs matplotlib."""

from __future__ import annotations

import importlib
import io
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: On paper; the page replaces each by a variable, which has another value in the dark.
INK, SOFT, GRID, PAPER = "#1b1f24", "#59626d", "#dde1e6", "#ffffff"
#: Told apart under deuteranopia, protanopia and tritanopia, and 3:1 against the paper (WCAG 2.2,
#: 1.4.11); found by a search for the largest least distance in Oklab, Machado's (2009) simulation.
SERIES = ("#0053d3", "#c43d14", "#27a19b", "#9b529c", "#9d9710", "#5d4a67")
DARK = {
    INK: "#e6e9ed", SOFT: "#a3acb8", GRID: "#333a43", PAPER: "#14171a",
    **dict(zip(SERIES, ("#5aa5ff", "#fa5a01", "#43d9a0", "#ffa1e7", "#f1ea45", "#a78f9c"),
               strict=True)),
}  # fmt: skip
#: The names of the page's variables.
VARIABLES = {
    INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper",
    **{colour: f"c{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip
PHASE_COLOURS = dict(
    zip(("compute", "wait", "update", "reduce", "data", "other"), SERIES, strict=True)
)
MARKERS = "os^DvPX"  # one more than colours: 42 pairs
HEAT = "cividis"  # the same to all kinds of eyes, and in grey

SETTINGS = {
    "axes.edgecolor": SOFT,
    "axes.facecolor": PAPER,
    "axes.formatter.limits": (-4, 5),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,  # lines below it are seen, and do not disturb
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mpidl",  # the same file for the same figure
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelsize": 10,
    "ytick.color": SOFT,
    "ytick.labelsize": 10,
}


def library(name: str = "matplotlib") -> Any:
    """Return matplotlib, or a module of it. Raises MpidlError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MpidlError("a plot needs matplotlib: pip install 'mpidl[report]'") from error


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in this style: around all of it, or before a function that does it."""
    matplotlib = library()
    cycle = importlib.import_module("cycler").cycler(color=SERIES)
    with matplotlib.rc_context({**SETTINGS, "axes.prop_cycle": cycle}):
        yield


def figure(panels: int = 1, width: float = 6.0, height: float = 5.0, **options: Any) -> Any:
    """Return a figure and its panels, side by side; `width` and `height` of each, in inches."""
    made = library("matplotlib.figure").Figure(
        figsize=(width * panels, height), layout="constrained"
    )
    made._repr_png_ = partial(_png, made)  # notebooks draw by themselves only those of pyplot
    return made, made.subplots(1, panels, **options)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def counts(axis: Any) -> None:
    """Write the numbers of an axis as 500, 1.5k, 20M."""
    ticker = library("matplotlib.ticker")
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def look(i: int) -> dict[str, Any]:
    """Return colour and marker of the series `i`."""
    return {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
