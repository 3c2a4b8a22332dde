"""The table of a model's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import markup
from mpidl.autograd import Record, trace
from mpidl.autograd.tensor import array_of
from mpidl.nn.flops import flops
from mpidl.nn.module import Parameter
from mpidl.nn.predict import evaluating, like
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.nn.module import Module

HEAD = ("layer", "kind", "output", "parameters", "FLOPs")


@dataclass
class Row:
    """One call of one module: what it does itself, the modules below not counted."""

    name: str  #: "" is the model
    kind: str  #: its class
    depth: int  #: 0 is the model
    output: tuple[int, ...] | None = None  #: None: not called, or not one array
    parameters: int = 0  #: 0 from the second call on, and where another row counts them
    flops: int = 0


@dataclass(frozen=True)
class Summary:
    """The layers in the order they are called, and totals: `print` it.

    FLOPs are those of one forward pass in evaluation mode, as `nn.flops` counts them: 2 for each
    multiply-add (linear, matmul, einsum, conv2d, attention), all else 1 an element. `rows` add
    up to the totals; a module that was not called has a row if it has parameters.
    """

    rows: list[Row]
    input: tuple[int, ...]  #: shape
    parameters: int
    flops: int

    def __str__(self) -> str:
        table = [HEAD, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for cells in table:
            left = [c.ljust(w) for c, w in zip(cells[:3], widths[:3], strict=True)]
            right = [c.rjust(w) for c, w in zip(cells[3:], widths[3:], strict=True)]
            lines.append("  ".join(left + right))
        rule = "-" * len(lines[0])
        return "\n".join([f"input {self.input}", lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def _repr_html_(self) -> str:
        return f"<p>input {self.input}</p>\n" + markup.table(HEAD, self._cells(), left=3)

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        cells = []
        above: list[str] = []  # names, from the model down
        for row in self.rows:
            above[row.depth :] = [row.name]
            inside = f"{above[-2]}." if len(above) > 1 else ""
            name = "  " * row.depth + (row.name.removeprefix(inside) or "model")
            output = "-" if row.output is None else str(row.output)
            cells.append((name, row.kind, output, f"{row.parameters:,}", f"{row.flops:,}"))
        return [*cells, ("total", "", "", f"{self.parameters:,}", f"{self.flops:,}")]


def summarize(model: Module, example: Array | tuple[int, ...]) -> Summary:
    """Run `model` once on `example`, an input or its shape. See `Module.summary`."""
    x = _input(model, example)
    names = {id(module): name for name, module in model.named_modules().items()}
    rows: list[Row] = []
    called: list[Row] = []  # from the model down to where we are
    counted: set[int] = set()  # parameters, by id
    removers = []

    def make_row(module: Module, depth: int) -> Row:
        row = Row(names[id(module)], type(module).__name__, depth)
        for _, child in module.children():
            if isinstance(child, Parameter) and id(child) not in counted:
                counted.add(id(child))
                row.parameters += child.size
        rows.append(row)
        return row

    def book(records: list[Record]) -> None:
        """Charge what ran since the last call or return to the module that ran it."""
        if called:
            called[-1].flops += sum(map(flops, records))
        records.clear()  # its arrays are free to go

    with evaluating(model), trace() as records:

        def enter(module: Module, _: Any) -> None:
            book(records)
            called.append(make_row(module, len(called)))

        def leave(_: Module, __: Any, output: Any) -> None:
            book(records)
            called.pop().output = getattr(output, "shape", None)

        for module in model.modules():
            removers += [module.on_forward(enter), module.on_output(leave)]
        try:
            model(x)
        finally:
            for remove in removers:
                remove()
    seen = {row.name for row in rows}
    for name, module in model.named_modules().items():
        if name not in seen and any(isinstance(c, Parameter) for _, c in module.children()):
            make_row(module, 1)
    return Summary(
        rows, x.shape, sum(row.parameters for row in rows), sum(row.flops for row in rows)
    )


def modules_table(model: Module) -> str:
    """Return the table of modules, with parameters of their own, that a notebook shows."""
    rows = []
    counted: set[int] = set()
    for name, module in model.named_modules().items():
        own = {id(c): c.size for _, c in module.children() if isinstance(c, Parameter)}
        size = sum(n for key, n in own.items() if key not in counted)
        counted |= set(own)
        kind = f"{type(module).__name__}({module.arguments()})"
        rows.append((name or "model", kind, f"{size:,}"))
    total = sum(parameter.size for parameter in model.parameters())
    return markup.table(("layer", "kind", "parameters"), [*rows, ("total", "", f"{total:,}")], 2)


@refuses
def _input(model: Module, example: Array | tuple[int, ...]) -> Array:
    x = np.zeros(example, np.float32) if isinstance(example, tuple) else array_of(example)
    return like(model, x)
