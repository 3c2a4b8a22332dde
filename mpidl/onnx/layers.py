"""Converters of products, of what works on pictures, and of normalisation."""

from __future__ import annotations

import math
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.onnx.runs import lengths

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.onnx.graph import Graph
    from mpidl.onnx.runs import Length, Step

    Converter = Callable[[Graph, Step], str]


def linear(g: Graph, s: Step) -> str:
    """Convert `linear`; the weights stay (outputs, inputs) in the file."""
    values = [g.value(x) for x in s.inputs]
    if len(lengths(s.inputs[0])) == 2:
        return g.node("Gemm", *values, transB=1)
    y = g.node("MatMul", values[0], g.node("Transpose", values[1], perm=[1, 0]))
    return g.node("Add", y, values[2]) if len(values) == 3 else y


def einsum(g: Graph, s: Step) -> str:
    """Convert `einsum`, all spelt out: ONNX leaves less to rules than NumPy."""
    axes = [lengths(x) for x in s.inputs]
    equation = g.same(s.options["subscripts"], "subscripts").replace(" ", "")
    terms, output = _spelt(equation, [len(a) for a in axes])
    longest: dict[str, int] = {}
    for term, own in zip(terms, axes, strict=True):
        for letter, axis in zip(term, own, strict=True):
            longest[letter] = max(longest.get(letter, 1), *axis)
    values = []
    for i, x in enumerate(s.inputs):
        value = g.value(x, s.dtype)
        # an axis of length 1 where another input's is longer is stretched by NumPy only
        letters = zip(terms[i], axes[i], strict=True)
        short = [p for p, (c, axis) in enumerate(letters) if max(axis) == 1 < longest[c]]
        values.append(g.node("Squeeze", value, g.integers(short)) if short else value)
        terms[i] = "".join(c for p, c in enumerate(terms[i]) if p not in short)
    return g.node("Einsum", *values, equation=f"{','.join(terms)}->{output}")


def _spelt(equation: str, ndims: list[int]) -> tuple[list[str], str]:
    """Return the letters of each input, and of the output, where there may be ellipses or none."""
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    hidden = [n - len(term.replace("...", "")) for term, n in zip(terms, ndims, strict=True)]
    free = "".join(c for c in ascii_letters if c not in equation)[: max(hidden)]
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        output = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelt = [t.replace("...", free[len(free) - n :]) for t, n in zip(terms, hidden, strict=True)]
    return spelt, output.replace("...", free)


def embedding(g: Graph, s: Step) -> str:
    """Convert `embedding`."""
    weight, indices = g.value(s.inputs[0]), s.options["indices"]
    wide = indices[0].dtype if indices[0].dtype in (np.int32, np.int64) else np.int64
    return g.node("Gather", weight, g.value(indices, wide), axis=0)


def conv2d(g: Graph, s: Step) -> str:
    """Convert `conv2d`."""
    kernel = s.inputs[1][0].shape[2:]
    dilations = _pair(g, s, "dilation")
    groups = g.same(s.options["groups"], "groups")
    return g.node(
        "Conv", *map(g.value, s.inputs), **_window(g, s, kernel), dilations=dilations, group=groups
    )


def max_pool2d(g: Graph, s: Step) -> str:
    """Convert `max_pool2d`."""
    return g.node("MaxPool", g.value(s.inputs[0]), **_window(g, s, _pair(g, s, "size")))


def avg_pool2d(g: Graph, s: Step) -> str:
    """Convert `avg_pool2d`."""
    window = _window(g, s, _pair(g, s, "size"))
    return g.node("AveragePool", g.value(s.inputs[0]), **window, count_include_pad=1)


def layer_norm(g: Graph, s: Step) -> str:
    """Convert `layer_norm`."""
    values = (g.value(x, s.dtype) for x in s.inputs)
    return g.node("LayerNormalization", *values, axis=-1, epsilon=g.same(s.options["eps"], "eps"))


def batch_norm(g: Graph, s: Step) -> str:
    """Convert `batch_norm`, whose statistics are those of the training."""
    values = (*s.inputs, s.options["mean"], s.options["var"])
    eps = g.same(s.options["eps"], "eps")
    return g.node("BatchNormalization", *(g.value(v, s.dtype) for v in values), epsilon=eps)


def attention(g: Graph, s: Step) -> str:
    """Convert `attention`."""
    q, k, v = (g.value(x, s.dtype) for x in s.inputs)
    width = s.inputs[0][0].shape[-1]
    scale = g.same(s.options.get("scale", (None,)), "scale")
    factor = 1 / math.sqrt(max(1, width)) if scale is None else scale
    axes = lengths(s.inputs[0])
    return _attend(g, s, (q, k, v), factor, [*axes[:-1], lengths(s.inputs[1])[-2]])


def self_attention(g: Graph, s: Step) -> str:
    """Convert `self_attention`: as `attention`, the three parts cut out of one."""
    heads = g.same(s.options["heads"], "heads")
    batch, length, wide = lengths(s.inputs[0])
    runs = len(batch)
    width = wide[0] // (3 * heads)
    qkv = g.reshape(
        g.value(s.inputs[0]), [batch, length, (3,) * runs, (heads,) * runs, (width,) * runs]
    )
    qkv = g.node("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (g.node("Gather", qkv, g.constant(i, "int64"), axis=0) for i in range(3))
    factor = 1 / math.sqrt(width)
    y = _attend(g, s, (q, k, v), factor, [batch, (heads,) * runs, length, length])
    return g.reshape(g.node("Transpose", y, perm=[0, 2, 1, 3]), s.lengths)


def _attend(
    g: Graph, s: Step, parts: tuple[str, str, str], factor: float, scores_of: list[Length]
) -> str:
    """Write softmax(q k^T factor) v, for scores of these lengths."""
    q, k, v = parts
    last = len(scores_of)
    turned = [*range(last - 2), last - 1, last - 2]
    scores = g.node("Mul", q, g.constant(factor, s.dtype))
    scores = g.node("MatMul", scores, g.node("Transpose", k, perm=turned))
    allowed, blind = _allowed(g, s, scores_of)
    if allowed:
        least = g.constant(np.finfo(s.dtype).min, s.dtype)  # not -inf: no NaN in rows without keys
        scores = g.node("Where", allowed, scores, least)
    p = g.node("Softmax", scores, axis=-1)
    if blind:
        p = g.node("Where", allowed, p, g.constant(0, s.dtype))
    drop = s.options.get("drop", (None,))
    if drop[0] is not None:
        p = g.node("Mul", p, g.value(drop, s.dtype))
    return g.node("MatMul", p, v)


def _allowed(g: Graph, s: Step, scores_of: list[Length]) -> tuple[str, bool]:
    """Return the mask, or "", and whether a query may be left without any key."""
    mask, causal = s.options.get("mask", (None,)), g.same(s.options["causal"], "causal")
    given = "" if mask[0] is None else g.value(mask, bool)
    if not causal:
        return given, bool(given)
    n, m = (g.same(axis, "the length of causal attention") for axis in scores_of[-2:])
    earlier = g.constant(np.tri(n, m, m - n, dtype=bool), bool)
    if given:
        return g.node("And", given, earlier), True
    return earlier, m < n


def _pair(g: Graph, s: Step, name: str) -> list[int]:
    value = g.same(s.options[name], name)
    return [value, value] if isinstance(value, int) else list(value)


def _window(g: Graph, s: Step, kernel: Any) -> dict[str, list[int]]:
    high, wide = _pair(g, s, "padding")
    strides = s.options["stride"]
    return {
        "kernel_shape": list(kernel),
        "strides": list(kernel) if strides[0] is None else _pair(g, s, "stride"),
        "pads": [high, wide, high, wide],
    }
