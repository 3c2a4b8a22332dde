"""Boxes, texts and arrows, as SVG whose lines have the colour of the text around it."""

from __future__ import annotations

import html
import math
from typing import Any

LIGHT, DARK = "#1f2328", "#e6edf3"
BLUE, ORANGE, GREEN, GREY = "#2f81b7", "#d9822b", "#3f9d5a", "#8b949e"
#: Without a page around it, a figure has the colour for the reader's settings.
STYLE = (
    f"<style>.figure{{color:{LIGHT}}}@media (prefers-color-scheme:dark)"
    f"{{.figure{{color:{DARK}}}}}</style>"
)
HEAD = 6.0  # pixels: of an arrow


class Figure:
    """Positions are in pixels, from the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.parts: list[str] = []

    def box(
        self, place: tuple[float, ...], text: str = "", fill: str = GREY, opacity: float = 0.18,
        *, size: float = 12, dash: str = "", radius: int = 0,
    ) -> None:  # fmt: skip
        """Draw a box at (x, y, width, height), with lines of text in its middle."""
        x, y, w, h = place
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" fill="{fill}" '
            f'fill-opacity="{opacity}" stroke="currentColor" stroke-opacity=".55"{_dashed(dash)}/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            middle = y + h / 2 + size * (0.36 + 1.3 * (i - (len(lines) - 1) / 2))
            self.text(x + w / 2, middle, line, size)

    def text(self, x: float, y: float, text: str, size: float = 12, anchor: str = "middle",
             **more: Any) -> None:  # fmt: skip
        """Write a line; `more` are attributes."""
        attributes = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{attributes}>'
            f"{html.escape(text)}</text>"
        )

    def title(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Write a heading."""
        self.text(x, y, text, 13, anchor, font_weight=600)

    def notes(
        self, x: float, y: float, *lines: str, anchor: str = "start", size: float = 11.5
    ) -> None:
        """Write lines of explanation."""
        for i, line in enumerate(lines):
            self.text(x, y + 16 * i, line, size, anchor, fill_opacity=0.85)

    def line(
        self, *points: tuple[float, float], colour: str = "currentColor", head: bool = True,
        dash: str = "", width: float = 1.5,
    ) -> None:  # fmt: skip
        """Draw a line through points, with an arrow's head at the last."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._path(f"M{path}", colour, width, dash)
        if head:
            self._head(points[-2], points[-1], colour)

    def curve(self, start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float],
              colour: str) -> None:  # fmt: skip
        """Draw an arrow that bends."""
        self._path("M{:g} {:g}Q{:g} {:g} {:g} {:g}".format(*start, *bend, *end), colour, 1.5, "")
        self._head(bend, end, colour)

    def _path(self, path: str, colour: str, width: float, dash: str) -> None:
        self.parts.append(
            f'<path d="{path}" stroke="{colour}" stroke-width="{width:g}" fill="none"'
            f"{_dashed(dash)}/>"
        )

    def _head(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        length = math.dist(start, end)
        u, v = (HEAD * (end[i] - start[i]) / length for i in (0, 1))
        x, y = end
        points = (x, y), (x - u - v / 2, y - v + u / 2), (x - u + v / 2, y - v - u / 2)
        told = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        self.parts.append(f'<polygon points="{told}" fill="{colour}"/>')

    def svg(self, colour: str | None = None) -> str:
        """Return the file; with a `colour` for lines and texts, if given."""
        w, h = self.size
        head = (
            f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" '
            f'width="{w}" height="{h}" font-family="system-ui, sans-serif" fill="currentColor">'
        )
        text = "\n".join([head, *([] if colour else [STYLE]), *self.parts, "</svg>\n"])
        return text.replace("currentColor", colour) if colour else text


def _dashed(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""
