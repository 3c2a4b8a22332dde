"""Draws the figures of the documentation: `python docs/img/make.py`.

Lines and texts have the colour of the text around them in the pages of the site, and elsewhere that
for the reader's settings; fills are see-through. README.md has two files of a figure, since code
hosts choose between these.

The plots need matplotlib. Their numbers, with date, machine and command, stand in figures.json.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from svg import BLUE, DARK, GREEN, GREY, LIGHT, ORANGE, STYLE, Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent
STEPS = ("shard\nof the data", "batch:\nits part", "forward,\nloss", "backward", "bucket")


def flow() -> Figure:
    """Draw how a step goes, on ranks 0 to P-1."""
    f = Figure(880, 236)
    for name, y in (("rank 0", 34), ("rank P\u22121", 138)):
        f.text(8, y + 26, name, 12, "start", font_weight=600)
        for i, step in enumerate(STEPS):
            x = 76 + 90 * i
            last = i == len(STEPS) - 1
            f.box((x, y, 74, 44), step, BLUE if last else GREY, 0.25 if last else 0.15, radius=4)
            f.line((x + 74, y + 22), (x + 89, y + 22))
        f.box((650, y, 84, 44), "optimizer:\nits own part", ORANGE, 0.22, radius=4)
        f.line((632, y + 22), (648, y + 22))
        f.line((734, y + 22), (750, y + 22))
    text = "strategy\n.reduce\n\nthe mean\nover samples"
    f.box((526, 14, 106, 190), text, BLUE, 0.25, size=13, radius=4)
    text = "strategy\n.share\n\nwhat each\nhas updated"
    f.box((752, 14, 116, 190), text, BLUE, 0.25, size=13, radius=4)
    f.text(26, 112, "\u22ee", 16)
    f.line((810, 204), (810, 222), (203, 222), (203, 184))
    f.notes(506, 216, "next batch", anchor="middle", size=12)
    return f


def _ranks(f: Figure, x: float, y: float, owned: Callable[[int], Sequence[int]]) -> list[float]:
    """Draw four ranks as columns of four slices, those they own filled; return their middles."""
    for rank in range(4):
        for part in range(4):
            fill, opacity = (ORANGE, 0.55) if part in owned(rank) else (GREY, 0.06)
            f.box((x + 50 * rank, y + 15 * part, 34, 15), "", fill, opacity)
        f.notes(x + 50 * rank + 17, y - 6, f"rank {rank}", anchor="middle", size=11)
    return [x + 50 * rank + 17 for rank in range(4)]


def strategies() -> Figure:
    """Draw who updates what, and what moves, for each strategy."""
    f = Figure(780, 560)

    def panel(col: int, row: int, name: str, who: str) -> tuple[float, float]:
        x, y = 14 + col * 260, 16 + row * 266
        f.box((x - 8, y - 10, 246, 254), "", GREY, 0.04, radius=6)
        f.text(x + 4, y + 12, name, 14, "start", font_weight=600, font_family="monospace")
        f.notes(x + 4, y + 30, who)
        return x + 18, y + 62

    def told(y: float, *lines: str) -> None:
        f.notes(x + 92, y, *lines, anchor="middle")

    def in_two(first: str, second: str, senders: Sequence[int]) -> None:
        """Draw two calls of MPI, and the update between."""
        f.box((x - 6, y + 82, 196, 26), first, BLUE, 0.25, radius=4)
        f.box((x - 6, y + 128, 196, 26), second, BLUE, 0.25, radius=4)
        for rank, middle in enumerate(middles):
            f.line((middle, y + 62), (middle, y + 80), colour=BLUE)
            if rank in senders:
                f.line((middle, y + 108), (middle, y + 126), colour=ORANGE)

    x, y = panel(0, 0, "allreduce", "each updates everything")
    middles = _ranks(f, x, y, lambda _: range(4))
    f.box((x - 6, y + 96, 196, 28), "MPI_Allreduce", BLUE, 0.25, radius=4)
    for m in middles:
        f.line((m - 5, y + 62), (m - 5, y + 94), colour=BLUE)
        f.line((m + 5, y + 94), (m + 5, y + 64), colour=BLUE)
    told(y + 150, "MPI adds up, in the way", "that it finds best")

    x, y = panel(1, 0, "ring", "each updates everything")
    middles = _ranks(f, x, y, lambda _: range(4))
    for a, b in itertools.pairwise(middles):
        f.line((a + 19, y + 30), (b - 19, y + 30), colour=BLUE)
    f.curve((middles[-1], y + 62), (x + 92, y + 126), (middles[0], y + 64), BLUE)
    told(
        y + 124,
        "to the next rank, in chunks:",
        "once round for the sums,",
        "once more for the means",
    )

    x, y = panel(2, 0, "parameter_server", "servers=2: these, one half each")
    middles = _ranks(f, x, y, lambda rank: {0: (0, 1), 2: (2, 3)}.get(rank, ()))
    in_two("MPI_Reduce, to the owner", "MPI_Bcast, from it", (0, 2))
    told(y + 172, "new parameters come back to all")

    x, y = panel(0, 1, "sharded", "each updates 1/P (ZeRO-1)")
    middles = _ranks(f, x, y, lambda rank: [rank])
    in_two("MPI_Reduce_scatter", "MPI_Allgatherv", range(4))
    told(y + 172, "updated parts come back to all")

    x, y = panel(1, 1, "hierarchical", "on one node: each updates 1/P")
    f.box((x - 12, y - 18, 208, 88), "", GREEN, 0.12, dash="4 3")
    middles = _ranks(f, x, y, lambda rank: [rank])
    f.notes(x + 92, y + 84, "gradients: all ranks map all of them", anchor="middle", size=11)
    f.box((x + 2, y + 110, 180, 20), "parameters, once", ORANGE, 0.55)
    for m in middles:
        f.line((m, y + 90), (m, y + 108), colour=ORANGE)
    told(y + 150, "nothing moves: each reads its slice", "of every gradient where it lies")

    x, y = panel(2, 1, "hierarchical", "on two nodes: each updates 1/P")
    for node in range(2):
        f.box((x - 10 + node * 100, y - 18, 96, 88), "", GREEN, 0.12, dash="4 3")
    middles = _ranks(f, x, y, lambda rank: [rank])
    for a, b in ((0, 2), (2, 0), (1, 3), (3, 1)):
        bend = (middles[a] + middles[b]) / 2, y + 118
        f.curve((middles[a], y + 74), bend, (middles[b], y + 74), BLUE)
    told(y + 118, "sums of a node go to the owners,", "parameters come back; all ranks")
    told(y + 150, "of a node at once, many pieces", "on their way")

    f.box((14, 534, 14, 12), "", ORANGE, 0.55)
    text = "what a rank owns: it averages and updates that, and keeps the optimizer's state of it"
    f.text(34, 545, text, 12, "start")
    return f


def memory() -> Figure:
    """Draw a bucket, and the memory of a node of two ranks."""
    f = Figure(780, 330)
    f.title(14, 22, "A bucket: parameters of one dtype, about 32 MiB of them; the last layer first")
    x = 14
    for w, name in (
        (120, "head.bias"),
        (240, "head.weight"),
        (110, "body.bias"),
        (282, "body.weight"),
    ):
        f.box((x, 34, w, 30), name, BLUE, 0.2)
        x += w
    f.notes(14, 82, "each begins on a cache line (64 bytes), and is a view into the bucket")
    f.title(14, 122, "Memory that both ranks of a node map (memfd_create): no file, no name")
    rows = ("parameters", 134, ORANGE, 0.5), ("gradient of rank 0", 178, BLUE, 0.25)
    for name, y, colour, opacity in (*rows, ("gradient of rank 1", 222, BLUE, 0.25)):
        f.text(14, y + 21, name, 12.5, "start")
        what = "slice of rank" if colour == ORANGE else "added up by rank"
        f.box((150, y, 308, 32), f"{what} 0", colour, opacity)
        f.box((458, y, 308, 32), f"{what} 1", colour, opacity / 2)
    f.notes(
        14, 282,
        "Backward of rank r writes gradient r, all of it. A slice ends at a cache line, so that no",
        "two ranks write to one. Momentum and the like exist once, a part with each rank. The mean",
        "is never written to memory: it is handed to the optimizer block by block, in cache.",
    )  # fmt: skip
    return f


def nodes() -> Figure:
    """Draw who owns which slice on two nodes of two ranks, and what passes the wire."""
    f = Figure(780, 316)
    columns = (150, 304, 458, 612)
    for rank, x in enumerate(columns):
        f.notes(x + 77, 20, f"owned by rank {rank}", anchor="middle", size=12)
    for node, y in ((0, 34), (1, 166)):
        f.box((4, y - 6, 772, 96), "", GREEN, 0.08, dash="4 3")
        f.title(14, y + 16, f"node {node}")
        f.notes(14, y + 33, f"ranks {2 * node} and {2 * node + 1}")
        for i, x in enumerate(columns):
            mine = i // 2 == node
            text = f"parameters: rank {i}" if mine else f"come from rank {i}"
            fill, opacity = (ORANGE, 0.25) if mine else (GREY, 0.08)
            f.box((x, y + 46 * node, 154, 36), text, fill, opacity)
            fill, opacity = (ORANGE, 0.45) if mine else (BLUE, 0.15)
            text = f"rank {2 * node + i % 2} adds up"
            f.box((x, y + 46 * (1 - node), 154, 36), text, fill, opacity)
    for x in columns[:2]:  # owned by node 0
        f.line((x + 12, 172), (x + 12, 110), colour=BLUE)
        f.line((x + 142, 64), (x + 142, 218), colour=ORANGE, dash="5 3")
    for x in columns[2:]:
        f.line((x + 12, 110), (x + 12, 172), colour=BLUE)
        f.line((x + 142, 218), (x + 142, 64), colour=ORANGE, dash="5 3")
    f.line((14, 282), (44, 282), colour=BLUE)
    f.text(52, 286, "reduce: the other node's sums, to the owner", 12, "start")
    f.line((400, 282), (430, 282), colour=ORANGE, dash="5 3")
    f.text(438, 286, "share: what the owner has updated, back", 12, "start")
    text = "A node sends half of the bytes in each of the two, and its two ranks send at once."
    f.text(14, 308, text, 12, "start")
    return f


def protocol() -> Figure:
    """Draw the four phases of a step with hierarchical, on one node."""
    f = Figure(780, 212)
    for rank, y, late in ((0, 44, 0), (1, 96, 60)):
        f.title(10, y + 22, f"rank {rank}")
        f.box((90, y, 180 + late, 34), "1  forward, backward", radius=4)
        if not late:
            f.box((272, y, 58, 34), "waits", GREY, 0.03, size=11, dash="3 3", radius=4)
        f.box((360, y, 170 - late / 3, 34), "3  adds up, updates", ORANGE, 0.4, radius=4)
        place = (532 - late / 3, y, 28 + late / 3, 34)
        f.box(place, "waits" if late else "", GREY, 0.03, size=11, dash="3 3", radius=4)
        f.box((592, y, 150, 34), "1  the next one", radius=4)
        f.text(756, y + 22, "\u2026", 14)
    for x, name in ((345, "2  weights"), (576, "4  barrier")):
        f.line((x, 34), (x, 146), colour=BLUE, head=False, width=3)
        f.text(x, 26, name, 12, font_weight=600)
    f.notes(
        14, 172,
        "2: who has the weights of all ranks knows that all gradients are complete. 4: who is",
        "past the barrier knows that all slices are updated, and that nobody reads its gradient",
        "any more. Nobody waits elsewhere; no gradient, no parameter is sent.",
    )  # fmt: skip
    return f


def plot(name: str) -> str:
    """Draw figures.json[name] as bars, of which ranges have a line, with LIGHT as text's colour."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    known = json.loads((HERE / "figures.json").read_text())[name]
    rows = known["rows"]
    plt.rcParams.update({"svg.hashsalt": "mpidl", "svg.fonttype": "none"})
    for what in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        plt.rcParams[what] = LIGHT
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rows) + 0.95))
    for i, (label, low, high) in enumerate(rows):
        colour = ORANGE if label.startswith("mpidl") else GREY
        axes.barh(i, (low + high) / 2, 0.62, color=colour, alpha=0.85)
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
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def main() -> None:
    """Write all files."""
    for draw in (flow, strategies, memory, nodes, protocol):
        (HERE / f"{draw.__name__}.svg").write_text(draw().svg())
    for theme, colour in (("light", LIGHT), ("dark", DARK)):
        (HERE / f"flow_{theme}.svg").write_text(flow().svg(colour))
    for name in json.loads((HERE / "figures.json").read_text()):
        text = plot(name)
        (HERE / f"{name}_light.svg").write_text(text)
        (HERE / f"{name}_dark.svg").write_text(text.replace(LIGHT, DARK))
        of_page = text.replace(LIGHT, "currentColor")
        (HERE / f"{name}.svg").write_text(of_page.replace("<defs>", f"{STYLE}<defs>", 1))


if __name__ == "__main__":
    main()
