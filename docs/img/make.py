"""Draws the figures of the documentation: python docs/img/make.py

Lines and texts have the colour of the text around them (currentColor), in the pages of the site, and
black or white by the reader's settings elsewhere; fills are see-through. So all of it can be read on
light and on dark. README.md has two files of a figure, since code hosts choose between these.

The plots need matplotlib. Their numbers, with date, machine and command, stand in figures.json.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
LIGHT, DARK = "#1f2328", "#e6edf3"
STYLE = f"<style>.figure{{color:{LIGHT}}}@media (prefers-color-scheme:dark){{.figure{{color:{DARK}}}}}</style>"
STEPS = ("shard\nof the data", "batch:\nits part", "forward,\nloss", "backward", "bucket")
BLUE, ORANGE, GREEN, GREY = "#2f81b7", "#d9822b", "#3f9d5a", "#8b949e"


class Figure:
    """An SVG, piece by piece; positions in pixels, from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.size, self.parts = (width, height), []

    def box(self, x, y, w, h, text="", fill=GREY, opacity=0.18, size=13, dash="", bold=False, stroke="currentColor", r=4):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r}" fill="{fill}" '
            f'fill-opacity="{opacity}" stroke="{stroke}" stroke-opacity=".55"{dashed}/>'
        )
        lines = text.split("\n")
        for i, line in enumerate(lines):
            middle = y + h / 2 + size * 0.36 + (i - (len(lines) - 1) / 2) * size * 1.3
            self.text(x + w / 2, middle, line, size, bold=bold)

    def text(self, x, y, text, size=13, anchor="middle", opacity=1.0, bold=False, mono=False):
        weight = ' font-weight="600"' if bold else ""
        family = ' font-family="monospace"' if mono else ""
        faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}{family}{faint}>'
            f"{html.escape(text)}</text>"
        )

    def line(self, x1, y1, x2, y2, colour="currentColor", head=True, dash="", width=1.5):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{colour}" stroke-width="{width}" fill="none"{dashed}/>'
        )
        if head:
            self._head(x1, y1, x2, y2, colour)

    def curve(self, x1, y1, cx, cy, x2, y2, colour="currentColor"):
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}Q{cx:g} {cy:g} {x2:g} {y2:g}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
        )
        self._head(cx, cy, x2, y2, colour)

    def _head(self, x1, y1, x2, y2, colour, size=6.0):
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5 or 1
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        left = (x2 - size * ux - size * 0.5 * uy, y2 - size * uy + size * 0.5 * ux)
        right = (x2 - size * ux + size * 0.5 * uy, y2 - size * uy - size * 0.5 * ux)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in ((x2, y2), left, right))
        self.parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def svg(self, colour: str | None = None) -> str:
        """Return the file; with a `colour` for lines and texts, if given."""
        w, h = self.size
        head = (
            f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" '
            f'width="{w:g}" height="{h:g}" font-family="system-ui, sans-serif" fill="currentColor">'
        )
        text = "\n".join([head, *([] if colour else [STYLE]), *self.parts, "</svg>\n"])
        return text.replace("currentColor", colour) if colour else text


def flow() -> Figure:
    """Draw how a step goes, on ranks 0 to P-1."""
    f = Figure(880, 236)
    for name, y in (("rank 0", 34), ("rank P\u22121", 138)):
        f.text(8, y + 26, name, 12, "start", bold=True)
        x = 76
        for i, step in enumerate(STEPS):
            f.box(x, y, 74, 44, step, BLUE if i == 4 else GREY, 0.25 if i == 4 else 0.15, 12)
            f.line(x + 74, y + 22, x + 89, y + 22)
            x += 90
        f.box(650, y, 84, 44, "optimizer:\nits own part", ORANGE, 0.22, 12)
        f.line(632, y + 22, 648, y + 22)
        f.line(734, y + 22, 750, y + 22)
    f.box(526, 14, 106, 190, "strategy\n.reduce\n\nthe mean\nover samples", BLUE, 0.25, 13)
    f.box(752, 14, 116, 190, "strategy\n.share\n\nwhat each\nhas updated", BLUE, 0.25, 13)
    f.text(26, 112, "\u22ee", 16)
    f.line(810, 204, 810, 222, head=False)
    f.line(810, 222, 203, 222, head=False)
    f.line(203, 222, 203, 184)
    f.text(506, 216, "next batch", 12, opacity=0.8)
    return f


def _ranks(f: Figure, x: float, y: float, owned, colour=ORANGE, labels=True) -> list[float]:
    """Draw four ranks as columns of four slices, those they own filled; return their middles."""
    middles = []
    for rank in range(4):
        left = x + rank * 50
        for part in range(4):
            has = part in owned(rank)
            f.box(left, y + part * 15, 34, 15, "", colour if has else GREY, 0.55 if has else 0.06, r=0)
        if labels:
            f.text(left + 17, y - 6, f"rank {rank}", 11, opacity=0.85)
        middles.append(left + 17)
    return middles


def strategies() -> Figure:
    """Draw who updates what, and what moves, for each strategy."""
    f = Figure(780, 560)
    every, own = (lambda r: range(4)), (lambda r: [r])

    def panel(col, row, name, who):
        x, y = 14 + col * 260, 16 + row * 266
        f.box(x - 8, y - 10, 246, 254, "", GREY, 0.04, r=6)
        f.text(x + 4, y + 12, name, 14, "start", bold=True, mono=True)
        f.text(x + 4, y + 30, who, 11.5, "start", opacity=0.85)
        return x + 18, y + 62

    x, y = panel(0, 0, "allreduce", "each updates everything")
    mids = _ranks(f, x, y, every)
    f.box(x - 6, y + 96, 196, 28, "MPI_Allreduce", BLUE, 0.25, 12)
    for m in mids:
        f.line(m - 5, y + 62, m - 5, y + 94, BLUE)
        f.line(m + 5, y + 94, m + 5, y + 64, BLUE)
    f.text(x + 92, y + 150, "MPI adds up, by what it", 11.5, opacity=0.85)
    f.text(x + 92, y + 166, "thinks is the best way", 11.5, opacity=0.85)

    x, y = panel(1, 0, "ring", "each updates everything")
    mids = _ranks(f, x, y, every)
    for a, b in zip(mids, mids[1:]):
        f.line(a + 19, y + 30, b - 19, y + 30, BLUE)
    f.curve(mids[-1], y + 62, x + 92, y + 126, mids[0], y + 64, BLUE)
    f.text(x + 92, y + 124, "to the next rank, in chunks:", 11.5, opacity=0.85)
    f.text(x + 92, y + 140, "once round for the sums,", 11.5, opacity=0.85)
    f.text(x + 92, y + 156, "once more for the means", 11.5, opacity=0.85)

    x, y = panel(2, 0, "parameter_server", "servers=2: these, one half each")
    mids = _ranks(f, x, y, lambda r: {0: (0, 1), 2: (2, 3)}.get(r, ()))
    f.box(x - 6, y + 82, 196, 26, "MPI_Reduce, to the owner", BLUE, 0.25, 12)
    f.box(x - 6, y + 128, 196, 26, "MPI_Bcast, from it", BLUE, 0.25, 12)
    for rank, m in enumerate(mids):
        f.line(m, y + 62, m, y + 80, BLUE)
        if rank % 2 == 0:
            f.line(m, y + 108, m, y + 126, ORANGE)
    f.text(x + 92, y + 172, "new parameters come back to all", 11.5, opacity=0.85)

    x, y = panel(0, 1, "sharded", "each updates 1/P (ZeRO-1)")
    mids = _ranks(f, x, y, own)
    f.box(x - 6, y + 82, 196, 26, "MPI_Reduce_scatter", BLUE, 0.25, 12)
    f.box(x - 6, y + 128, 196, 26, "MPI_Allgatherv", BLUE, 0.25, 12)
    for m in mids:
        f.line(m, y + 62, m, y + 80, BLUE)
        f.line(m, y + 108, m, y + 126, ORANGE)
    f.text(x + 92, y + 172, "updated parts come back to all", 11.5, opacity=0.85)

    x, y = panel(1, 1, "hierarchical", "on one node: each updates 1/P")
    f.box(x - 12, y - 18, 208, 88, "", GREEN, 0.12, dash="4 3")
    mids = _ranks(f, x, y, own)
    f.text(x + 92, y + 84, "gradients: all ranks map all of them", 11, opacity=0.85)
    f.box(x + 2, y + 110, 180, 20, "", ORANGE, 0.55, r=0)
    f.text(x + 92, y + 124, "parameters, once", 12)
    for m in mids:
        f.line(m, y + 90, m, y + 108, ORANGE)
    f.text(x + 92, y + 150, "nothing moves: each reads its slice", 11.5, opacity=0.85)
    f.text(x + 92, y + 166, "of every gradient where it lies", 11.5, opacity=0.85)

    x, y = panel(2, 1, "hierarchical", "on two nodes: each updates 1/P")
    for node in range(2):
        f.box(x - 10 + node * 100, y - 18, 96, 88, "", GREEN, 0.12, dash="4 3")
    mids = _ranks(f, x, y, own)
    for a, b in ((0, 2), (1, 3)):
        f.curve(mids[a], y + 74, (mids[a] + mids[b]) / 2, y + 118, mids[b], y + 74, BLUE)
        f.curve(mids[b], y + 74, (mids[a] + mids[b]) / 2, y + 118, mids[a], y + 74, BLUE)
    f.text(x + 92, y + 118, "sums of a node go to the owners,", 11.5, opacity=0.85)
    f.text(x + 92, y + 134, "parameters come back; all ranks", 11.5, opacity=0.85)
    f.text(x + 92, y + 150, "of a node at once, many pieces", 11.5, opacity=0.85)
    f.text(x + 92, y + 166, "on their way", 11.5, opacity=0.85)
    f.box(14, 534, 14, 12, "", ORANGE, 0.55, r=0)
    f.text(34, 545, "what a rank owns: it averages and updates that part, and keeps the optimizer's state of it", 12, "start")
    return f


def memory() -> Figure:
    """Draw a bucket, and the memory of a node of two ranks."""
    f = Figure(780, 330)
    f.text(14, 22, "A bucket: parameters of one dtype, about 32 MiB of them; the last layer first", 13, "start", bold=True)
    x = 14
    for w, name in ((120, "head.bias"), (240, "head.weight"), (110, "body.bias"), (282, "body.weight")):
        f.box(x, 34, w, 30, name, BLUE, 0.2, 12, r=0)
        x += w
    f.text(14, 82, "each parameter begins on a cache line (64 bytes), and is a view into the bucket", 11.5, "start", opacity=0.85)

    f.text(14, 122, "Memory that both ranks of a node map (memfd_create): no file, no name", 13, "start", bold=True)
    rows = (("parameters", 134, ORANGE), ("gradient of rank 0", 178, BLUE), ("gradient of rank 1", 222, BLUE))
    for name, y, colour in rows:
        f.text(14, y + 22, name, 12.5, "start")
        f.box(150, y, 308, 32, "slice of rank 0" if colour == ORANGE else "", colour, 0.45 if colour == ORANGE else 0.22, 12, r=0)
        f.box(458, y, 308, 32, "slice of rank 1" if colour == ORANGE else "", colour, 0.25 if colour == ORANGE else 0.12, 12, r=0)
    for rank, x in ((0, 304), (1, 612)):
        for y in (199, 243):
            f.text(x, y, f"added up by rank {rank}", 11.5, opacity=0.85)
    f.text(14, 282, "Backward of rank r writes gradient r, all of it. A slice ends at a cache line, so that no two ranks write", 11.5, "start", opacity=0.85)
    f.text(14, 299, "to one. Momentum and the like exist once, a part with each rank. The mean itself is never written to", 11.5, "start", opacity=0.85)
    f.text(14, 316, "memory: it is handed to the optimizer block by block, in cache.", 11.5, "start", opacity=0.85)
    return f


def nodes() -> Figure:
    """Draw who owns which slice on two nodes of two ranks, and what passes the wire."""
    f = Figure(780, 316)
    columns = (150, 304, 458, 612)
    for rank, x in enumerate(columns):
        f.text(x + 77, 20, f"owned by rank {rank}", 12, opacity=0.9)
    for node, y in ((0, 34), (1, 166)):
        f.box(4, y - 6, 772, 96, "", GREEN, 0.08, dash="4 3")
        rows = (y, y + 46) if node == 0 else (y + 46, y)  # of parameters, and of sums
        f.text(14, y + 16, f"node {node}", 13, "start", bold=True)
        f.text(14, y + 33, f"ranks {2 * node} and {2 * node + 1}", 11.5, "start", opacity=0.85)
        for i, x in enumerate(columns):
            mine = i // 2 == node
            fill, opacity = (ORANGE, 0.25) if mine else (GREY, 0.08)
            text = f"parameters: rank {i}" if mine else f"come from rank {i}"
            f.box(x, rows[0], 154, 36, text, fill, opacity, 12, r=0)
            fill, opacity = (ORANGE, 0.45) if mine else (BLUE, 0.15)
            f.box(x, rows[1], 154, 36, f"rank {2 * node + i % 2} adds up", fill, opacity, 12, r=0)
    for i, x in enumerate(columns):
        down = i >= 2
        f.line(x + 12, 110 if down else 172, x + 12, 172 if down else 110, BLUE)
        f.line(x + 142, 218 if down else 64, x + 142, 64 if down else 218, ORANGE, dash="5 3")
    f.line(14, 282, 44, 282, BLUE)
    f.text(52, 286, "reduce: the other node's sums, to the owner", 12, "start")
    f.line(400, 282, 430, 282, ORANGE, dash="5 3")
    f.text(438, 286, "share: what the owner has updated, back", 12, "start")
    f.text(14, 308, "A node sends half of the bytes in each direction, and its two ranks send at once.", 12, "start")
    return f


def protocol() -> Figure:
    """Draw the four phases of a step with hierarchical, on one node."""
    f = Figure(780, 210)
    ends = (90, 330, 360, 560, 600, 770)
    for rank, y, late in ((0, 44, 0), (1, 96, 60)):
        f.text(10, y + 22, f"rank {rank}", 13, "start", bold=True)
        f.box(90, y, 180 + late, 34, "1  forward, backward", GREY, 0.18, 12)
        if not late:
            f.box(272, y, 58, 34, "waits", GREY, 0.03, 11, dash="3 3")
        f.box(360, y, 170 - late / 3, 34, "3  adds up, updates", ORANGE, 0.4, 12)
        f.box(532 - late / 3, y, 28 + late / 3, 34, "waits" if late else "", GREY, 0.03, 11, dash="3 3")
        f.box(592, y, 150, 34, "1  the next one", GREY, 0.18, 12)
        f.text(756, y + 22, "…", 14)
    for x, name in ((345, "2  weights"), (576, "4  barrier")):
        f.line(x, 34, x, 146, BLUE, head=False, width=3)
        f.text(x, 26, name, 12, bold=True)
    f.text(14, 172, "2: who has the weights of all ranks knows that all gradients are complete. 4: who is past the barrier knows that", 11.5, "start", opacity=0.85)
    f.text(14, 189, "all slices are updated, and that nobody reads its gradient any more. Nobody waits elsewhere; no gradient, no parameter is sent.", 11.5, "start", opacity=0.85)
    return f


def plot(name: str) -> str:
    """Draw bars of figures.json[name], medians or ranges, as SVG with LIGHT as its text colour."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    known = json.loads((HERE / "figures.json").read_text())[name]
    rows = known["rows"]
    plt.rcParams.update({"svg.hashsalt": "mpidl", "font.size": 10, "font.family": "DejaVu Sans"})
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), LIGHT))
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 0.95))
    for i, (label, low, high) in enumerate(rows):
        own = label.startswith("mpidl")
        axes.barh(i, (low + high) / 2, 0.62, color=ORANGE if own else GREY, alpha=0.85)
        if low != high:
            axes.plot([low, high], [i, i], color=LIGHT, lw=1.5, solid_capstyle="butt")
        shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        axes.annotate(shown, (high, i), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(row[2] for row in rows) * 1.16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(known["unit"])
    axes.set_title(known["title"], loc="left", fontsize=10.5, fontweight="bold")
    figure.tight_layout()
    path = HERE / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = path.read_text()
    text = re.sub(r"<\?xml.*?<svg ", '<svg class="figure" ', text, flags=re.DOTALL)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Write all files."""
    for draw in (flow, strategies, memory, nodes, protocol):
        (HERE / f"{draw.__name__}.svg").write_text(draw().svg())
    (HERE / "flow-light.svg").write_text(flow().svg(LIGHT))
    (HERE / "flow-dark.svg").write_text(flow().svg(DARK))
    for name in json.loads((HERE / "figures.json").read_text()):
        text = plot(name)
        (HERE / f"{name}-light.svg").write_text(text)
        (HERE / f"{name}-dark.svg").write_text(text.replace(LIGHT, DARK))
        site = text.replace(LIGHT, "currentColor")
        (HERE / f"{name}.svg").write_text(site.replace("<defs>", STYLE + "<defs>", 1))


if __name__ == "__main__":
    main()
