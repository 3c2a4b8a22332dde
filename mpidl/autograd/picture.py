"""`draw`: the graph of a tensor as a picture, in graphviz's language and by its program."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.autograd.graph import Vertex, names_of, survey
from mpidl.autograd.tensor import Tensor
from mpidl.errors import AutogradError, InvalidArgument, MpidlError
from mpidl.refuse import refuses, told

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

TEXT, FORMATS = (".dot", ".gv"), (".svg", ".png", ".pdf")
MISSING = (
    "a picture needs graphviz's program dot: apt install graphviz, or conda install graphviz; "
    'without it, save("graph.dot") and str() give the text'
)
SECONDS = 20.0  # that a notebook waits for a picture by itself
LARGE = 60  # vertices: from here on exact places take dot minutes, where one leaf is used often
LONGEST_NAME, MOST_TEXT = 200, 50_000  # characters; of a text in a notebook

# Ink that is read on white and on black: contrast 4.5 to both. An <img> inherits no colour.
HEAD = """\
digraph {
  graph [bgcolor=transparent, rankdir=TB, ranksep=0.3]
  node [shape=box, style="rounded,filled", fillcolor="#dce8f5", color="#767676", height=0.3]
  node [fontname="Helvetica,Arial,sans-serif", fontsize=12, fontcolor="#1a1a1a"]
  edge [fontname="Helvetica,Arial,sans-serif", fontsize=10, fontcolor="#767676", color="#767676"]
"""
QUICK = "  graph [nslimit=1, nslimit1=1, mclimit=0.2, splines=line]\n"
LEAF = 'style=filled, fillcolor="#e3f1dc"'
RESULT = 'style=filled, shape=ellipse, fillcolor="#fbe9cf"'


def draw(loss: Tensor, model: Any = None, *, params: Mapping[str, Tensor] | None = None) -> Picture:
    """Return the graph that was recorded behind `loss`, a tensor of any shape, as a picture.

    Leaves, which gather gradients, are green, and operations blue; along the arrows, which go as
    the forward pass went, stand dtypes and shapes. Names of leaves come from `model` (an
    `nn.Module`) or `params` (a dict by name). Inputs that need no gradient are not recorded.
    Costs one backward, and leaves the graph, the gradients and the other ranks alone.

    Raises AutogradError for what is no tensor with a graph, where an earlier backward freed it (of
    a part that it freed only the last operation is left, dashed), and for what gives no names.
    """
    if not isinstance(loss, Tensor):
        raise AutogradError(f"draw: expected a Tensor, found {told(loss)}")
    return Picture(survey(loss), names_of(model, params))


class Picture:
    """A drawn graph: a notebook shows it, `save` writes it, and `str` is its DOT text."""

    def __init__(self, vertices: list[Vertex], names: dict[int, str]) -> None:
        self.operations = sum(bool(v.name) for v in vertices)
        self.leaves = len(vertices) - self.operations
        self.dot = _dot(vertices, names)  #: the text in graphviz's language
        self._svg: str | None = None
        self._tried = False

    @property
    def svg(self) -> str:
        """The picture as SVG. Raises MpidlError without graphviz."""
        if self._svg is None:
            self._svg = _svg(self.dot)
        return self._svg

    @refuses
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture: .dot and .gv are text; .svg, .png and .pdf need graphviz.

        Raises InvalidArgument for other names, and where the file cannot be written, and MpidlError
        without graphviz.
        """
        path = Path(path)
        if path.suffix not in TEXT + FORMATS:
            known = ", ".join(TEXT + FORMATS)
            raise InvalidArgument(
                f"save to {told(str(path))}: expected a name that ends in {known}"
            )
        if path.suffix in TEXT:
            made = self.dot.encode()
        else:
            made = self.svg.encode() if path.suffix == ".svg" else _run(path.suffix[1:], self.dot)
        try:
            path.write_bytes(made)
        except OSError as error:
            raise InvalidArgument(f"save: cannot write {path}: {error}") from error

    def __str__(self) -> str:
        return self.dot

    def __repr__(self) -> str:
        s = "s" * (self.operations != 1)
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves} leaves"
        return f"Picture({self.operations} operation{s}, {leaves})"

    def _repr_svg_(self) -> str | None:
        return self._shown()

    def _repr_html_(self) -> str | None:
        """Show the text where there is no picture: a front end takes what it gets."""
        from html import escape

        shown = self.dot if len(self.dot) <= MOST_TEXT else repr(self)
        return None if self._shown() else f"<pre>{escape(shown)}</pre>"

    def _shown(self) -> str | None:
        """Return the picture, if it can be had soon; this is tried once."""
        if self._svg is None and not self._tried:
            self._tried = True
            with suppress(MpidlError):
                self._svg = _svg(self.dot, SECONDS)
        return self._svg


def _dot(vertices: list[Vertex], names: dict[int, str]) -> str:
    lines = [HEAD, QUICK * (len(vertices) >= LARGE)]
    for place, v in enumerate(vertices):
        if not v.name:
            look = f"label={_quoted(names.get(id(v.source), 'leaf'))}, {LEAF}"
        elif v.freed:
            look = f'label={_quoted(f"{v.name} (freed)")}, style="rounded,filled,dashed"'
        else:
            look = f"label={_quoted(v.name)}"
        lines.append(f"  n{place} [{look}]\n")
        lines += (_edge(i, f"n{place}", vertices[i]) for i in v.inputs)
    last = len(vertices) - 1
    lines += (f"  result [{RESULT}]\n", _edge(last, "result", vertices[last]), "}\n")
    return "".join(lines)


def _edge(place: int, to: str, vertex: Vertex) -> str:
    label = "" if vertex.shape is None else f" {vertex.dtype} {vertex.shape}"
    weight = ", weight=4" if vertex.name else ""  # operations stand below each other
    return f"  n{place} -> {to} [label={_quoted(label)}{weight}]\n"


def _quoted(name: str) -> str:
    """Return a DOT string that is shown as `name`: without escapes and entities."""
    if len(name) > LONGEST_NAME:
        name = name[: LONGEST_NAME - 3] + "..."
    seen = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return '"' + seen.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"') + '"'


def _program() -> str | None:
    from shutil import which

    return which("dot")


def _svg(text: str, seconds: float | None = None) -> str:
    made = _run("svg", text, seconds).decode()
    return made[made.index("<svg") :]  # so that it can stand in a page


def _run(kind: str, text: str, seconds: float | None = None) -> bytes:
    import subprocess

    program = _program()
    if program is None:
        raise MpidlError(MISSING)
    line = [program, f"-T{kind}"]
    try:
        found = subprocess.run(
            line, input=text.encode(), capture_output=True, check=False, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MpidlError(f"{program}: {error}") from error
    if found.returncode or not found.stdout:
        words = found.stderr.decode(errors="replace").strip()
        raise MpidlError(f"{program} -T{kind} ended with status {found.returncode}: {words}")
    return found.stdout
