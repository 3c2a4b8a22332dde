"""The operations as functions of tensors: `from mpidl import functional as F`.

Arguments by position are tensors or arrays (NumPy or CuPy), which may be differentiated; results
are tensors. The methods of `Tensor` are the same operations. All raise AutogradError, with the
operation's name and the shapes, where these do not fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from mpidl.autograd.tensor import Tensor, apply, array_of
from mpidl.errors import AutogradError
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.array import Array

    X: TypeAlias = Tensor | Array
    Pair: TypeAlias = int | tuple[int, int]
    Axis: TypeAlias = int | tuple[int, ...] | None


# -- single elements ------------------------------------------------------------------------------


def exp(x: X) -> Tensor:
    """Return e to the power of each element."""
    return apply("exp", x)


def log(x: X) -> Tensor:
    """Return the natural logarithm of each element."""
    return apply("log", x)


def sqrt(x: X) -> Tensor:
    """Return the square root of each element."""
    return apply("sqrt", x)


def sin(x: X) -> Tensor:
    """Return the sine of each element, in radians."""
    return apply("sin", x)


def cos(x: X) -> Tensor:
    """Return the cosine of each element, in radians."""
    return apply("cos", x)


def abs(x: X) -> Tensor:  # noqa: A001
    """Return the absolute value of each element; its derivative at 0 is 0."""
    return apply("abs", x)


def clip(x: X, low: float | None = None, high: float | None = None) -> Tensor:
    """Return each element limited to low..high; outside, the gradient is 0."""
    return apply("clip", x, low=low, high=high)


def maximum(x: X, y: X | float) -> Tensor:
    """Return the larger of each two elements, broadcast; equal ones share the gradient."""
    return apply("maximum", x, y)


def minimum(x: X, y: X | float) -> Tensor:
    """Return the smaller of each two elements, broadcast; equal ones share the gradient."""
    return apply("minimum", x, y)


def where(condition: X, x: X | float, y: X | float) -> Tensor:
    """Return x where `condition` (bool) holds and y elsewhere, all three broadcast."""
    return apply("where", x, y, condition=array_of(condition))


# -- activations ----------------------------------------------------------------------------------


def relu(x: X) -> Tensor:
    """Return max(x, 0); its derivative at 0 is 0."""
    return apply("relu", x)


def leaky_relu(x: X, slope: float = 0.01) -> Tensor:
    """Return x above 0, slope x elsewhere (Maas et al. 2013)."""
    return apply("leaky_relu", x, slope=slope)


def gelu(x: X, approximate: str = "none") -> Tensor:
    """Return x Phi(x) (Hendrycks and Gimpel 2016), or, with "tanh", their approximation."""
    return apply("gelu", x, approximate=approximate)


def sigmoid(x: X) -> Tensor:
    """Return 1 / (1 + exp(-x)); never overflows."""
    return apply("sigmoid", x)


def tanh(x: X) -> Tensor:
    """Return the hyperbolic tangent."""
    return apply("tanh", x)


def threshold(x: X, threshold: float, value: float) -> Tensor:
    """Return x above `threshold`, `value` elsewhere."""
    return apply("threshold", x, threshold=threshold, value=value)


def softmax(x: X, axis: int = -1) -> Tensor:
    """Return exp(x) over its sum along `axis`; never overflows."""
    return apply("softmax", x, axis=axis)


def log_softmax(x: X, axis: int = -1) -> Tensor:
    """Return the logarithm of softmax along `axis`; never underflows."""
    return apply("log_softmax", x, axis=axis)


def dropout(x: X, mask: Array) -> Tensor:
    """Return x mask, for a mask of 0 and 1 / (1 - p) that is broadcast to the shape of x."""
    return apply("dropout", x, mask=mask)


# -- along axes, and shapes -----------------------------------------------------------------------


def sum(x: X, axis: Axis = None, *, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Return the sum along `axis` (all axes by default)."""
    return apply("sum", x, axis=axis, keepdims=keepdims)


def mean(x: X, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Return the mean along `axis` (all axes by default); 0 of no elements."""
    return apply("mean", x, axis=axis, keepdims=keepdims)


def max(x: X, axis: Axis = None, *, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Return the largest along `axis`; equal ones share the gradient."""
    return apply("max", x, axis=axis, keepdims=keepdims)


def min(x: X, axis: Axis = None, *, keepdims: bool = False) -> Tensor:  # noqa: A001
    """Return the smallest along `axis`; equal ones share the gradient."""
    return apply("min", x, axis=axis, keepdims=keepdims)


def var(x: X, axis: Axis = None, *, correction: float = 0, keepdims: bool = False) -> Tensor:
    """Return the variance along `axis`: squared deviations over (count - correction)."""
    return apply("var", x, axis=axis, correction=correction, keepdims=keepdims)


def reshape(x: X, shape: tuple[int, ...]) -> Tensor:
    """Return the same elements in another shape; one length may be -1."""
    return apply("reshape", x, shape=shape)


def transpose(x: X, axes: tuple[int, ...] | None = None) -> Tensor:
    """Return the axes in another order; reversed by default."""
    return apply("transpose", x, axes=axes)


def broadcast_to(x: X, shape: tuple[int, ...]) -> Tensor:
    """Return x repeated along new axes and those of length 1, without a copy."""
    return apply("broadcast", x, shape=shape)


def concatenate(xs: Sequence[X], axis: int = 0) -> Tensor:
    """Return the xs one after the other along an axis that they have."""
    return apply("concatenate", *_several(xs, "concatenate"), axis=axis)


def stack(xs: Sequence[X], axis: int = 0) -> Tensor:
    """Return the xs, all of one shape, along a new axis."""
    return apply("stack", *_several(xs, "stack"), axis=axis)


def _several(xs: Any, who: str) -> Sequence[X]:
    try:
        return tuple(xs)
    except TypeError:
        raise AutogradError(f"{who}: expected a list of tensors, found {told(xs)}") from None


def pad(x: X, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Return x with (before, after) more elements of `value` along each axis."""
    return apply("pad", x, widths=widths, value=value)


# -- products -------------------------------------------------------------------------------------


def matmul(x: X, y: X) -> Tensor:
    """Return the matrix product over the last two axes, broadcast over those before."""
    return apply("matmul", x, y)


def einsum(subscripts: str, *xs: X) -> Tensor:
    """Return Einstein's sum, as in NumPy: "bij,bjk->bik"; ellipses and diagonals included."""
    return apply("einsum", *xs, subscripts=subscripts)


def linear(x: X, weight: X, bias: X | None = None) -> Tensor:
    """Return x (..., k) @ weight (m, k)^T + bias (m,): (..., m)."""
    return apply("linear", x, weight) if bias is None else apply("linear", x, weight, bias)


def embedding(indices: X, weight: X) -> Tensor:
    """Return weight[indices]: rows of weight (count, width) by integers (...): (..., width)."""
    return apply("embedding", weight, indices=array_of(indices))


def attention(
    q: X,
    k: X,
    v: X,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    drop: Array | None = None,
) -> Tensor:
    """Return softmax(q k^T scale) v, for q (..., n, d), k (..., m, d), v (..., m, e).

    `mask` (bool, broadcast to (..., n, m)) tells which keys a query may look at; one that may
    look at none gets 0. `causal`: at those up to its own place, the last query's being the last
    key. `drop` (..., n, m) multiplies the probabilities. `scale` is 1/sqrt(d) by default
    (Vaswani et al. 2017, section 3.2.1).
    """
    options = {"mask": mask, "causal": causal, "scale": scale, "drop": drop}
    return apply("attention", q, k, v, **options)


def self_attention(
    qkv: X,
    heads: int,
    *,
    mask: Array | None = None,
    causal: bool = False,
    drop: Array | None = None,
) -> Tensor:
    """Return the attention of `heads` heads within qkv (n, length, 3 width): (n, length, width).

    The last axis holds the queries, then the keys, then the values, each (heads, width / heads).
    `mask` is broadcast to (n, heads, length, length). As `attention`, without a copy.
    """
    return apply("self_attention", qkv, heads=heads, mask=mask, causal=causal, drop=drop)


# -- pictures, and normalisation ------------------------------------------------------------------


def conv2d(
    x: X,
    weight: X,
    bias: X | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Correlate x (n, c, h, w) with weight (o, c / groups, kh, kw), and add bias (o,)."""
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return apply("conv2d", *inputs, **options)


def max_pool2d(x: X, size: Pair, *, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Return the maximum over windows of x (n, c, h, w); `stride` is `size` by default."""
    return apply("max_pool2d", x, size=size, stride=stride, padding=padding)


def avg_pool2d(x: X, size: Pair, *, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Return the mean over windows of x (n, c, h, w), the padding's zeros counted."""
    return apply("avg_pool2d", x, size=size, stride=stride, padding=padding)


def layer_norm(x: X, weight: X, bias: X, *, eps: float = 1e-5) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) weight + bias over the last axis (Ba et al. 2016)."""
    return apply("layer_norm", x, weight, bias, eps=eps)


def batch_norm(
    x: X,
    weight: X,
    bias: X,
    *,
    mean: Array,
    var: Array,
    eps: float = 1e-5,
    count: float | None = None,
    total: Any = None,
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) weight + bias for x (n, channels, ...).

    All others are (channels,). With `count`, the number of elements per channel behind `mean` and
    `var`, the gradient takes into account that both depend on x; without, they are constants.
    `total` sums an array (k,) over ranks, where the statistics are those of all ranks: then
    backward is collective (Ioffe and Szegedy 2015, algorithm 1).
    """
    options = {"mean": mean, "var": var, "eps": eps, "count": count, "total": total}
    return apply("batch_norm", x, weight, bias, **options)


# -- losses ---------------------------------------------------------------------------------------


def cross_entropy(logits: X, labels: X, *, smoothing: float = 0.0) -> Tensor:
    """Return the mean of -log softmax(logits (n, classes))[labels (n,), integers]; 0 if n = 0.

    `smoothing` spreads that share of each label evenly over all classes (Szegedy et al. 2016).
    """
    return apply("cross_entropy", logits, labels=array_of(labels), smoothing=smoothing)


def mse(x: X, target: X, *, reduction: str = "mean") -> Tensor:
    """Return the mean, or sum, of squared errors of two arrays of the same shape; 0 if empty."""
    return apply("mse", x, target=array_of(target), reduction=reduction)


def l1(x: X, target: X, *, reduction: str = "mean") -> Tensor:
    """Return the mean, or sum, of absolute errors of two arrays of the same shape; 0 if empty."""
    return apply("l1", x, target=array_of(target), reduction=reduction)


def binary_cross_entropy(logits: X, target: X, *, reduction: str = "mean") -> Tensor:
    """Return the mean, or sum, of -t log s - (1 - t) log(1 - s), s = sigmoid(logits), t in 0..1.

    Both of the same shape; 0 if empty. Stable for logits of any size.
    """
    return apply("binary_cross_entropy", logits, target=array_of(target), reduction=reduction)


def kl(log_probabilities: X, target: X) -> Tensor:
    """Return the divergence of the model from probabilities `target` (n, ...): the mean over n.

    sum(t (log t - x)) for each of the n; 0 if n = 0 (Kullback and Leibler 1951).
    """
    return apply("kl", log_probabilities, target=array_of(target))
