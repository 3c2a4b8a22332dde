"""Converters of indexing, and of the same elements in another order or shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.array import is_array, to_numpy
from mpidl.onnx.graph import INT64
from mpidl.onnx.runs import FromInput, lengths

if TYPE_CHECKING:
    from mpidl.onnx.graph import Graph
    from mpidl.onnx.runs import Length, Seen, Step

END = np.iinfo(np.int64).max  # a place after the last; -END is one before the first
WHOLE = slice(None)


def reshape(g: Graph, s: Step) -> str:
    """Convert `reshape`."""
    return g.reshape(g.value(s.inputs[0]), s.lengths)


def transpose(g: Graph, s: Step) -> str:
    """Convert `transpose`."""
    ndim, axes = len(s.lengths), g.same(s.options["axes"], "axes")
    order = range(ndim)[::-1] if axes is None else [a % ndim for a in axes]
    return g.node("Transpose", g.value(s.inputs[0]), perm=list(order))


def broadcast(g: Graph, s: Step) -> str:
    """Convert `broadcast`."""
    return g.node("Expand", g.value(s.inputs[0]), g.shape(s.lengths))


def concatenate(g: Graph, s: Step) -> str:
    """Convert `concatenate`."""
    axis = int(g.same(s.options["axis"], "axis"))
    return g.node("Concat", *(g.value(x, s.dtype) for x in s.inputs), axis=axis)


def stack(g: Graph, s: Step) -> str:
    """Convert `stack`."""
    axis = int(g.same(s.options["axis"], "axis")) % len(s.lengths)
    where = g.integers([axis])
    parts = (g.node("Unsqueeze", g.value(x, s.dtype), where) for x in s.inputs)
    return g.node("Concat", *parts, axis=axis)


def pad(g: Graph, s: Step) -> str:
    """Convert `pad`."""
    widths = [tuple(map(tuple, w)) for w in s.options["widths"]]
    before, after = zip(*g.same(tuple(widths), "widths"), strict=True)
    x, value = g.value(s.inputs[0]), g.value(s.options["value"], s.dtype)
    return g.node("Pad", x, g.integers([*before, *after]), value)


def getitem(g: Graph, s: Step) -> str:
    """Convert `getitem`: new axes, then slices and numbers, then arrays of indices."""
    x, axes = g.value(s.inputs[0]), lengths(s.inputs[0])
    parts, adjacent = _parts(g, s.options["key"], len(axes))
    new = [i for i, part in enumerate(parts) if part[0] is None]
    if new:
        x = g.node("Unsqueeze", x, g.integers(new))
        for i in new:
            axes.insert(i, (1,) * len(g.sizes))
            parts[i] = (WHOLE,) * len(g.sizes)
    numbers = [i for i, part in enumerate(parts) if isinstance(part[0], int)]
    arrays = [i for i, part in enumerate(parts) if is_array(part[0])]
    x = _slice(g, x, parts, [] if arrays else numbers)
    if not arrays:
        return g.node("Squeeze", x, g.integers(numbers)) if numbers else x
    if len(arrays) == 1 and not numbers:
        return g.node("Gather", x, g.value(parts[arrays[0]], INT64), axis=arrays[0])
    return _pick(g, x, axes, {i: parts[i] for i in sorted(arrays + numbers)}, adjacent)


def _parts(g: Graph, keys: Seen, ndim: int) -> tuple[list[Seen], bool]:
    """Return a key's part for each axis, new ones included; and whether its indices are adjacent.

    An index is an array, or a number beside one (NumPy's user guide, "Combining advanced and
    basic indexing").
    """
    spelt, adjacent = [], True
    for key in keys:
        given = [_index(part) for part in (key if isinstance(key, tuple) else (key,))]
        for part in given:
            if isinstance(part, bool) or (isinstance(part, FromInput) and part.dtype == bool):
                raise g.refusal(
                    "a mask from the input gives a shape that depends on values: use where()"
                )
        places = [i for i, part in enumerate(given) if isinstance(part, int) or is_array(part)]
        adjacent = not places or places[-1] - places[0] + 1 == len(places)
        taken = sum(_axes_taken(part) for part in given)
        parts: list[Any] = []
        for part in given:
            if part is Ellipsis:
                parts += [WHOLE] * (ndim - taken)
            elif _is_mask(part):
                parts += to_numpy(part).nonzero()
            else:
                parts.append(part)
        spelt.append(parts + [WHOLE] * (ndim - sum(part is not None for part in parts)))
    if len({tuple(map(type, parts)) for parts in spelt}) > 1:
        raise g.refusal("its key is of another kind for another batch")
    return list(zip(*spelt, strict=True)), adjacent


def _index(part: Any) -> Any:
    if isinstance(part, list):
        return np.asarray(part)
    return part.item() if isinstance(part, np.generic) else part


def _axes_taken(part: Any) -> int:
    return part.ndim if _is_mask(part) else int(part is not None and part is not Ellipsis)


def _is_mask(part: Any) -> bool:
    return is_array(part) and part.dtype == bool


def _slice(g: Graph, x: str, parts: list[Seen], numbers: list[int]) -> str:
    """Cut the slices out of `x`, and at `numbers` one element each."""
    cut: list[tuple[int, int, Length, Length]] = []  # axis, step, starts, stops
    for axis, part in enumerate(parts):
        if axis in numbers:
            cut.append((axis, 1, part, tuple(END if i == -1 else i + 1 for i in part)))
        elif isinstance(part[0], slice) and any(p != WHOLE for p in part):
            step = g.same(tuple(1 if p.step is None else p.step for p in part), "a slice's step")
            first, last = (0, END) if step > 0 else (END, -END)
            begin = tuple(first if p.start is None else int(p.start) for p in part)
            end = tuple(last if p.stop is None else int(p.stop) for p in part)
            cut.append((axis, int(step), begin, end))
    if not cut:
        return x
    axes, steps, starts, stops = zip(*cut, strict=True)
    return g.node("Slice", x, g.shape(starts), g.shape(stops), g.integers(axes), g.integers(steps))


def _pick(g: Graph, x: str, axes: list[Length], index: dict[int, Seen], adjacent: bool) -> str:
    """Return the elements at places that several indices, broadcast, tell together."""
    names = [
        g.node("Mod", g.value(part, INT64), g.value(axes[axis], INT64))  # negative ones too
        for axis, part in index.items()
    ]
    zero = names[0]
    for name in names[1:]:
        zero = g.node("Add", zero, name)
    zero = g.node("Mul", zero, g.constant(0, INT64))  # of the shape of all indices, broadcast
    count = max(np.ndim(part[0]) for part in index.values())
    last = g.integers([count])
    names = [g.node("Unsqueeze", g.node("Add", name, zero), last) for name in names]
    others = [axis for axis in range(len(axes)) if axis not in index]
    x = g.node("Transpose", x, perm=[*index, *others])
    x = g.node("GatherND", x, g.node("Concat", *names, axis=count))
    before = sum(axis < min(index) for axis in others) if adjacent else 0
    if not before:
        return x
    order = [
        *range(count, count + before),
        *range(count),
        *range(count + before, count + len(others)),
    ]
    return g.node("Transpose", x, perm=order)
