"""Converters of reductions and losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mpidl.onnx.runs import lengths

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.onnx.graph import Graph
    from mpidl.onnx.runs import Step

    Converter = Callable[[Graph, Step], str]


def reduction(kind: str) -> Converter:
    """Return the converter of a reduction that is one node."""

    def convert(g: Graph, s: Step) -> str:
        keepdims = g.same(s.options["keepdims"], "keepdims")
        return _reduce(g, kind, g.value(s.inputs[0], s.dtype), _axes(g, s), keepdims)

    return convert


def softmax(kind: str) -> Converter:
    """Return the converter of `softmax` or `log_softmax`."""
    return lambda g, s: g.node(
        kind, g.value(s.inputs[0]), axis=int(g.same(s.options["axis"], "axis"))
    )


def var(g: Graph, s: Step) -> str:
    """Convert `var`: two passes, as the operation does."""
    x, axes = g.value(s.inputs[0], s.dtype), _axes(g, s)
    keepdims = g.same(s.options["keepdims"], "keepdims")
    correction = g.same(s.options["correction"], "correction")
    deviation = g.node("Sub", x, _reduce(g, "ReduceMean", x, axes, True))
    square = g.node("Mul", deviation, deviation)
    if correction == 0:
        return _reduce(g, "ReduceMean", square, axes, keepdims)
    shape = lengths(s.inputs[0])
    counts = [math.prod(shape[a][i] for a in axes) for i in range(len(g.sizes))]
    count = g.node("Sub", g.value(tuple(counts), s.dtype), g.constant(correction, s.dtype))
    return g.node("Div", _reduce(g, "ReduceSum", square, axes, keepdims), count)


def mse(g: Graph, s: Step) -> str:
    """Convert `mse`."""
    difference = g.node("Sub", *_pair(g, s))
    return _mean(g, s, g.node("Mul", difference, difference))


def l1(g: Graph, s: Step) -> str:
    """Convert `l1`."""
    return _mean(g, s, g.node("Abs", g.node("Sub", *_pair(g, s))))


def binary_cross_entropy(g: Graph, s: Step) -> str:
    """Convert `binary_cross_entropy`, by the same stable formula."""
    x, target = _pair(g, s)
    small = g.node("Softplus", g.node("Neg", g.node("Abs", x)))
    losses = g.node("Sub", g.node("Relu", x), g.node("Mul", x, target))
    return _mean(g, s, g.node("Add", small, losses))


def kl(g: Graph, s: Step) -> str:
    """Convert `kl`: a mean over rows of sums."""
    x, target = _pair(g, s)
    positive = g.node("Greater", target, g.constant(0, s.dtype))
    logs = g.node("Log", g.node("Where", positive, target, g.constant(1, s.dtype)))
    each = g.node("Mul", target, g.node("Sub", logs, x))
    axes = lengths(s.inputs[0])
    rows = g.value(axes[0], s.dtype) if axes else g.constant(1, s.dtype)
    return g.node("Div", _reduce(g, "ReduceSum", each, range(len(axes)), False), rows)


def cross_entropy(g: Graph, s: Step) -> str:
    """Convert `cross_entropy`: a mean over samples, of the label's part and of all classes'."""
    logs = g.node("LogSoftmax", g.value(s.inputs[0], s.dtype), axis=1)
    labels = g.value(s.options["labels"], "int64")
    index = g.node("Unsqueeze", labels, g.integers([1]))
    picked = g.node("GatherElements", logs, index, axis=1)
    smoothing = g.same(s.options["smoothing"], "smoothing")
    loss = g.node(
        "Mul",
        _reduce(g, "ReduceMean", picked, range(2), False),
        g.constant(smoothing - 1, s.dtype),
    )
    if not smoothing:
        return loss
    everywhere = _reduce(g, "ReduceMean", logs, range(2), False)
    return g.node("Sub", loss, g.node("Mul", everywhere, g.constant(smoothing, s.dtype)))


def _axes(g: Graph, s: Step) -> tuple[int, ...]:
    """Return the axes of a reduction, counted from the front."""
    ndim = len(lengths(s.inputs[0]))
    axis = g.same(s.options["axis"], "axis")
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def _reduce(g: Graph, kind: str, x: str, axes: tuple[int, ...] | range, keepdims: bool) -> str:
    if not len(axes):  # for which ONNX would take all of them
        return x
    if kind == "ReduceSum":  # the only one of operator set 17 that takes its axes as an input
        return g.node(kind, x, g.integers(tuple(axes)), keepdims=int(keepdims))
    return g.node(kind, x, axes=list(axes), keepdims=int(keepdims))


def _pair(g: Graph, s: Step) -> tuple[str, str]:
    return g.value(s.inputs[0], s.dtype), g.value(s.options["target"], s.dtype)


def _mean(g: Graph, s: Step, losses: str) -> str:
    """Return the mean, or the sum if the loss is one, over all elements."""
    mean = g.same(s.options["reduction"], "reduction") == "mean"
    kind = "ReduceMean" if mean else "ReduceSum"
    return _reduce(g, kind, losses, range(len(lengths(s.inputs[0]))), False)
