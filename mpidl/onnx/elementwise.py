"""Converters of operations on single elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.onnx.graph import Graph
    from mpidl.onnx.runs import Step

    Converter = Callable[[Graph, Step], str]


def plain(kind: str) -> Converter:
    """Return the converter to one node, whose inputs are all of the result's dtype."""
    return lambda g, s: g.node(kind, *(g.value(x, s.dtype) for x in s.inputs))


def leaky_relu(g: Graph, s: Step) -> str:
    """Convert `leaky_relu`."""
    slope = g.same(s.options["slope"], "slope")
    return g.node("LeakyRelu", g.value(s.inputs[0]), alpha=float(slope))


def threshold(g: Graph, s: Step) -> str:
    """Convert `threshold`."""
    x = g.value(s.inputs[0])
    above = g.node("Greater", x, g.value(s.options["threshold"], s.dtype))
    return g.node("Where", above, x, g.value(s.options["value"], s.dtype))


def gelu(g: Graph, s: Step) -> str:
    """Convert `gelu`, both kinds."""
    x = g.value(s.inputs[0])
    if g.same(s.options["approximate"], "approximate") == "tanh":
        scale = math.sqrt(2 / math.pi)
        inner = g.node("Mul", g.node("Mul", x, x), g.constant(0.044715 * scale, s.dtype))
        inner = g.node("Mul", g.node("Add", inner, g.constant(scale, s.dtype)), x)
        inner = g.node("Tanh", inner)
    else:
        inner = g.node("Erf", g.node("Mul", x, g.constant(math.sqrt(0.5), s.dtype)))
    half = g.node("Mul", x, g.constant(0.5, s.dtype))
    return g.node("Mul", half, g.node("Add", inner, g.constant(1, s.dtype)))


def clip(g: Graph, s: Step) -> str:
    """Convert `clip`."""
    limits = [
        "" if s.options[name][0] is None else g.value(s.options[name], s.dtype)
        for name in ("low", "high")
    ]
    return g.node("Clip", g.value(s.inputs[0], s.dtype), *limits)


def dropout(g: Graph, s: Step) -> str:
    """Convert `dropout`, whose mask a forward may keep in evaluation."""
    x = g.value(s.inputs[0], s.dtype)
    return g.node("Mul", x, g.value(s.options["mask"], s.dtype))


def where(g: Graph, s: Step) -> str:
    """Convert `where`."""
    condition = g.value(s.options["condition"], bool)
    return g.node("Where", condition, *(g.value(x, s.dtype) for x in s.inputs))


def convert(g: Graph, s: Step) -> str:
    """Convert `astype`, and `to`: a file knows no devices."""
    return g.value(s.inputs[0], s.dtype)
