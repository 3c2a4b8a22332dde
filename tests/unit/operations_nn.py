"""Cases of the operations of networks: see `operations.CASES`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional
from mpidl.autograd import apply
from tests.unit.draws import Rng, distinct, flip, pick, positive, shape, some_shape, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl import Tensor
    from tests.unit.operations import Case


def loss(function: Callable[..., Tensor], reductions: bool = True) -> Callable[[Rng], Case]:
    def case(rng: Rng) -> Case:
        target = rng.uniform(0, 1, some_shape(rng)) * pick(rng, [1, rng.integers(0, 2)])
        options = {"reduction": pick(rng, ["mean", "sum"])} if reductions else {}
        x = np.asarray(target + values(rng, np.shape(target)))
        return lambda t: function(t, np.asarray(target), **options), [x]

    return case


def embedding(rng: Rng) -> Case:
    count, width = shape(rng, 2)
    indices = rng.integers(0, count, some_shape(rng)).astype(pick(rng, ["int64", "uint8"]))
    return lambda w: functional.embedding(np.asarray(indices), w), [values(rng, (count, width))]


def cross_entropy(rng: Rng) -> Case:
    n, classes = shape(rng, 2)
    n, smoothing = pick(rng, [n, n, 0]), pick(rng, [0.0, float(rng.uniform(0, 0.9))])
    labels = rng.integers(0, classes, n)
    return lambda x: functional.cross_entropy(x, labels, smoothing=smoothing), [
        values(rng, (n, classes))
    ]


def attention_options(rng: Rng, whole: tuple[int, ...]) -> dict[str, Any]:
    """Return options for probabilities of this shape (..., n, m); masks may hide all keys."""
    options: dict[str, Any] = {"causal": flip(rng), "mask": None, "drop": None}
    if flip(rng):
        options["mask"] = rng.integers(0, 2, pick(rng, [whole, whole[-2:]])).astype(bool)
    if flip(rng):
        options["drop"] = rng.integers(0, 2, whole) / 0.5
    return options


def _in_dtype(options: dict[str, Any], dtype: Any) -> dict[str, Any]:
    drop = options["drop"]
    return options if drop is None else {**options, "drop": drop.astype(dtype)}


def attention(rng: Rng) -> Case:
    lead = pick(rng, [(), shape(rng, 1), shape(rng, 2), (0,)])
    n, m, d, e = shape(rng, 4)
    options = attention_options(rng, (*lead, n, m))
    options["scale"] = pick(rng, [None, float(rng.uniform(0.1, 2))])
    arrays = [values(rng, (*lead, *s)) for s in ((n, d), (m, d), (m, e))]
    return lambda q, k, v: functional.attention(q, k, v, **_in_dtype(options, q.dtype)), arrays


def self_attention(rng: Rng) -> Case:
    (n, length, each), heads = shape(rng, 3), int(rng.integers(1, 4))
    n = pick(rng, [n, n, 0])
    options = attention_options(rng, (n, heads, length, length))
    x = values(rng, (n, length, 3 * heads * each))
    return lambda t: functional.self_attention(t, heads, **_in_dtype(options, t.dtype)), [x]


def window(rng: Rng, least: int, most: int) -> int | tuple[int, int]:
    """Return an option of a window: one number, or one for each of height and width."""
    high, wide = map(int, rng.integers(least, most + 1, 2))
    return pick(rng, [high, (high, wide)])


def conv2d(rng: Rng) -> Case:
    n, groups, c, o = map(int, rng.integers((0, 1, 1, 1), (4, 4, 3, 3)))
    kernel = rng.integers(1, 4, 2)
    options = {
        "stride": window(rng, 1, 3),
        "padding": window(rng, 0, 2),
        "dilation": window(rng, 1, 2),
        "groups": groups,
    }
    reach = np.broadcast_to(options["dilation"], 2) * (kernel - 1) + 1
    least = np.maximum(1, reach - 2 * np.broadcast_to(options["padding"], 2))
    size = map(int, least + rng.integers(0, 4, 2))
    shapes = (n, groups * c, *size), (groups * o, c, *map(int, kernel)), (groups * o,)
    arrays = [values(rng, s) for s in shapes]
    return lambda *a: functional.conv2d(*a, **options), arrays[: int(rng.integers(2, 4))]


def pool(name: str) -> Callable[[Rng], Case]:
    """Windows that overlap, leave gaps, or reach beyond the border."""

    def case(rng: Rng) -> Case:
        kernel = rng.integers(1, 4, 2)
        padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
        size = np.maximum(1, kernel - 2 * np.array(padding)) + rng.integers(0, 5, 2)
        stride = pick(rng, [None, window(rng, 1, 4)])
        options = {"size": tuple(map(int, kernel)), "stride": stride, "padding": padding}
        n, c = map(int, rng.integers((0, 1), (4, 4)))
        return lambda x: apply(name, x, **options), [distinct(rng, (n, c, *map(int, size)))]

    return case


def layer_norm(rng: Rng) -> Case:
    lead, width = pick(rng, [(), (0,), shape(rng)]), int(rng.integers(1, 6))
    arrays = [values(rng, s) for s in ((*lead, width), (width,), (width,))]
    return lambda *a: functional.layer_norm(*a, eps=0.1), arrays


def batch_norm(rng: Rng) -> Case:
    x = values(rng, (*shape(rng, 2), *shape(rng)[:2]))
    arrays = [x, *(values(rng, x.shape[1:2]) for _ in range(2))]
    others = (0, *range(2, x.ndim))
    if flip(rng):  # in evaluation: the statistics are constants
        mean, var = values(rng, x.shape[1:2]), positive(rng, x.shape[1:2])
        return lambda *a: functional.batch_norm(*a, mean=mean, var=var), arrays
    total = pick(rng, [None, np.array])  # of one rank

    def trained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = x.data.mean(axis=others), x.data.var(axis=others)
        count = x.size / x.shape[1]
        options: Any = {"mean": mean, "var": var, "eps": 0.1, "count": count, "total": total}
        return functional.batch_norm(x, weight, bias, **options)

    return trained, arrays
