"""A run as some lines of text: curves in braille, ranks as bars."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from mpidl.clock import PHASES
from mpidl.report.drawing import duration, finite, short
from mpidl.report.run import OWN
from mpidl.report.values import number, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.run import Run

LATE_SECONDS = 120  # without news of a run that is said to run
MARGIN = 9  # columns before a curve: numbers of its axis
CURVE = 8  # lines of the loss curve; of throughput half of it
RANKS = 16  # bars at most, where nothing limits the lines
COLOURS = dict(zip(PHASES, ("blue", "yellow", "red", "magenta", "cyan", "bright_black"),
                   strict=True))  # fmt: skip
BLOCKS = dict(zip(PHASES, "█▚░▓▞·", strict=True))  # told apart without colours, too
LETTERS = dict(zip(PHASES, "CDWRUo", strict=True))
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character, by row and column


def picture(run: Run, width: int, lines: int | None, *, plain: bool) -> Text:
    """Return a run in at most `width` columns, and `lines` lines if given."""
    width = max(30, width)
    small = lines is not None and lines < 24
    loss = [(s.step, s.loss) for s in run.steps] or [(e.steps, e.loss) for e in run.epochs]
    rate = [(s.step, s.samples_per_second) for s in run.steps]
    rate = rate or [(e.steps, e.samples_per_second) for e in run.epochs]
    out = [Text(cut(text, width), style) for text, style in _head(run)]
    for name, points, high in (("loss", loss, CURVE), ("samples / s", rate, CURVE // 2)):
        if finite([y for _, y in points]):
            out += [Text(name, "bold"), *curve(points, width, 3 if small else high, plain=plain)]
    left = None if lines is None else lines - len(out)
    out += _ranks(run, width, left, plain=plain)
    shown = out if lines is None else out[:lines]
    return Text("\n").join(shown)


def line(run: Run) -> str:
    """Return how far a run is, in one line, as `mpidl status --watch` does."""
    state = run.state
    if not state:
        last = run.epochs[-1] if run.epochs else None
        done = "" if last is None else f", epoch {last.epoch}, loss {short(last.loss)}"
        return f"no state.json{done}"
    loss, rate = number(state.get("loss")), number(state.get("samples_per_second"))
    return f"{_place(run)}, loss {loss:.4f}, {rate:,.0f} samples/s"


def _place(run: Run) -> str:
    state = run.state
    step = f"step {_count(state, 'step')} of {_count(state, 'steps')}"
    epoch = f"epoch {_count(state, 'epoch')} of {_count(state, 'epochs')}"
    return f"{printable(str(state.get('state')))}, {step}, {epoch}"


def _count(state: dict[str, object], name: str) -> str:
    value = number(state.get(name))
    return f"{value:.0f}" if math.isfinite(value) else "?"


def _head(run: Run) -> list[tuple[str, str]]:
    """Return the first lines and their styles."""
    state = run.state.get("state")
    style = {"running": "green", "failed": "red", "stopped": "yellow"}.get(str(state), "bold")
    if state is None:
        return [(run.name, "bold"), (line(run), style)]
    words = [line(run)[len(_place(run)) + 2 :]]
    if state == "running":
        left, waiting = (number(run.state.get(n)) for n in ("seconds_left", "waiting"))
        if math.isfinite(left):
            words.append(f"{duration(left)} left")
        if math.isfinite(waiting):
            words.append(f"rank 0 waits {100 * waiting:.0f} %")
        since = time.time() - number(run.state.get("time"))
        if since > LATE_SECONDS:
            words.insert(0, f"no news for {duration(since)}")
    return [(run.name, "bold"), (_place(run), style), (", ".join(words), "")]


def compact(value: float) -> str:
    """Return a number in at most 8 characters."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def curve(
    points: Sequence[tuple[float, float]], width: int, high: int, *, plain: bool
) -> list[Text]:
    """Return points (x, y) as a curve of `high` lines with an axis on its left and below it.

    A cell of braille has 2 x 4 dots; where a dot stands for many points, it is their mean.
    """
    x, y = (np.array(v, float) for v in zip(*points, strict=True))
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    columns, rows = 2 * (width - MARGIN - 1), 4 * high
    low, top = float(y.min()), float(y.max())
    span = top - low or 1.0
    first, last = float(x.min()), float(x.max())
    place = ((x - first) / (last - first or 1.0) * (columns - 1)).round().astype(int)
    sums = np.bincount(place, y, columns)
    counts = np.bincount(place, minlength=columns)
    there = np.flatnonzero(counts)
    means = np.interp(np.arange(there[0], there[-1] + 1), there, sums[there] / counts[there])
    level = ((top - means) / span * (rows - 1)).round().astype(int).clip(0, rows - 1)
    cells = np.zeros((high, columns // 2), int)
    before = level[0]
    for column, row in enumerate(level, int(there[0])):
        for between in range(min(before, row), max(before, row) + 1):
            cells[between // 4, column // 2] |= DOTS[between % 4][column % 2]
        before = row
    out = []
    for i, cell in enumerate(cells):
        text = "".join(" *"[int(v > 0)] if plain else chr(BRAILLE + v) for v in cell)
        text = text.rstrip(" " + chr(BRAILLE))
        told = compact(top) if i == 0 else compact(low) if i == high - 1 and low < top else ""
        edge = "|" if plain else "│"
        out.append(Text(f"{told:>{MARGIN - 1}} {edge}").append(text, "blue"))
    begin = f"{'':{MARGIN}}{first:.0f}" if first < last else ""
    out.append(Text(f"{begin}{f'update {last:.0f}':>{max(0, width - len(begin))}}"))
    return out


def _ranks(run: Run, width: int, lines: int | None, *, plain: bool) -> list[Text]:
    """Return the ranks' time in the last epoch that tells of it, as bars."""
    some = [e.phases for e in run.epochs[-1:] if e.phases]
    if not some and run.steps and run.steps[-1].seconds:  # in the first epoch: rank 0's
        some = [{p: [v] for p, v in run.steps[-1].seconds.items()}]
    if not some:
        return []
    given = {p: np.nan_to_num(some[0].get(p, ())).clip(0) for p in PHASES}
    count = max(map(len, given.values()))
    times = np.stack([np.pad(v, (0, count - len(v))) for v in given.values()])  # (phases, ranks)
    room = RANKS if lines is None else max(1, lines - 2)  # two lines of words
    own = times[[PHASES.index(p) for p in OWN]].sum(0)
    shown = np.argsort(-own, kind="stable")[:room]
    if count <= room:
        shown = np.arange(count)
    marks = LETTERS if plain else BLOCKS
    title = "time of a rank" if count == 1 else f"time of each of {count} ranks"
    if count > room:
        title = f"time of the {room} of {count} ranks with most work"
    legend = Text(" " * MARGIN)
    for phase in PHASES:
        legend.append(f"{marks[phase]} ", COLOURS[phase]).append(f"{phase}  ")
    legend.rstrip()
    legend.truncate(width)
    out = [Text(title, "bold"), legend]
    longest = float(times.sum(0).max()) or 1.0
    for rank in shown:
        ends = (times[:, rank].cumsum() / longest * (width - MARGIN - 1)).round().astype(int)
        bar = Text(f"{rank:>{MARGIN - 1}} {'|' if plain else '│'}")
        for phase, begin, end in zip(PHASES, (0, *ends), ends, strict=False):
            bar.append(marks[phase] * (end - begin), COLOURS[phase])
        out.append(bar)
    return out


def cut(text: str, width: int) -> str:
    """Return `text` in at most `width` columns."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
