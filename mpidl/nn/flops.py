"""How many floating-point operations an operation of the autograd engine takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.autograd import Record

#: These move or look up elements, and compute none.
FREE = frozenset(
    [
        "astype",
        "broadcast",
        "concatenate",
        "embedding",
        "getitem",
        "pad",
        "reshape",
        "stack",
        "to",
        "transpose",
        "where",
    ]
)


def flops(record: Record) -> int:
    """Return the operations of a forward pass: a multiply-add counts 2.

    Products (linear, matmul, einsum, conv2d, attention) count their multiply-adds; a bias is
    where a sum starts, and adds none; what a mask hides counts. All else that computes counts 1
    for each element it makes, or takes, where those are more (sums, pooling).
    """
    if record.name in FREE:
        return 0
    product = PRODUCTS.get(record.name)
    if product is not None:
        return product(record)
    return max(record.result.size, *(getattr(x, "size", 1) for x in record.inputs))


def _matmul(record: Record) -> int:
    return 2 * record.result.size * record.inputs[0].shape[-1]


def _conv2d(record: Record) -> int:
    weight = record.inputs[1]
    return 2 * record.result.size * math.prod(weight.shape[1:])


def _attention(record: Record) -> int:
    q, k, v = record.inputs
    return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _self_attention(record: Record) -> int:
    return 4 * record.result.size * record.result.shape[1]


def _einsum(record: Record) -> int:
    """Take all sums at once: of n inputs, n - 1 products and a sum for each set of indices."""
    terms = record.options["subscripts"].replace(" ", "").split("->")[0].split(",")
    lengths: dict[Any, int] = {}
    for term, x in zip(terms, record.inputs, strict=True):
        before, dots, after = term.partition("...")
        hidden = x.ndim - len(before) - len(after)
        # axes behind an ellipsis are named by their number from its right end
        names = [*before, *(range(-hidden, 0) if dots else ()), *after]
        for name, length in zip(names, x.shape, strict=True):
            lengths[name] = max(length, lengths.get(name, 0))
    return len(terms) * math.prod(lengths.values())


PRODUCTS: dict[str, Callable[[Record], int]] = {
    "attention": _attention,
    "conv2d": _conv2d,
    "einsum": _einsum,
    "linear": _matmul,
    "matmul": _matmul,
    "self_attention": _self_attention,
}
