"""The operations: each computes its value and, beside it, how derivatives pass through it.

An operation takes arrays (or numbers) by position, each of which may be differentiated, and
options by name. It returns `value, adjoints, push`:

- `adjoints[i](gradient, out)` carries the gradient of the value back to input i (reverse mode).
  It may write its result into `out`, memory of the input's shape, or ignore it.
- `push(*tangents)` carries a small change of all inputs, one tangent each, on to the value
  (forward mode).

What an adjoint needs stands in its closure, and nothing else does: that is what stays in memory
until the backward pass. `OPS` is the one table of all operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.autograd.ops import activations as act
from mpidl.autograd.ops import elementwise as each
from mpidl.autograd.ops import losses, reductions, shapes
from mpidl.autograd.ops.attention import attention, self_attention
from mpidl.autograd.ops.conv import conv2d
from mpidl.autograd.ops.embedding import embedding
from mpidl.autograd.ops.linalg import einsum, linear, matmul
from mpidl.autograd.ops.norm import batch_norm, layer_norm
from mpidl.autograd.ops.pool import avg_pool2d, max_pool2d

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.autograd.ops.shared import Result

OPS: dict[str, Callable[..., Result]] = {
    "abs": each.absolute,
    "add": each.add,
    "astype": each.astype,
    "attention": attention,
    "avg_pool2d": avg_pool2d,
    "batch_norm": batch_norm,
    "binary_cross_entropy": losses.binary_cross_entropy,
    "broadcast": shapes.broadcast,
    "clip": each.clip,
    "concatenate": shapes.concatenate,
    "conv2d": conv2d,
    "cos": each.cos,
    "cross_entropy": losses.cross_entropy,
    "divide": each.divide,
    "dropout": act.dropout,
    "einsum": einsum,
    "embedding": embedding,
    "exp": each.exp,
    "gelu": act.gelu,
    "getitem": shapes.getitem,
    "kl": losses.kl,
    "l1": losses.l1,
    "layer_norm": layer_norm,
    "leaky_relu": act.leaky_relu,
    "linear": linear,
    "log": each.log,
    "log_softmax": act.log_softmax,
    "matmul": matmul,
    "max": reductions.largest,
    "max_pool2d": max_pool2d,
    "maximum": each.maximum,
    "mean": reductions.mean,
    "min": reductions.smallest,
    "minimum": each.minimum,
    "mse": losses.mse,
    "multiply": each.multiply,
    "negative": each.negative,
    "pad": shapes.pad,
    "power": each.power,
    "relu": act.relu,
    "reshape": shapes.reshape,
    "self_attention": self_attention,
    "sigmoid": act.sigmoid,
    "sin": each.sin,
    "softmax": act.softmax,
    "sqrt": each.sqrt,
    "stack": shapes.stack,
    "subtract": each.subtract,
    "sum": reductions.summation,
    "tanh": act.tanh,
    "threshold": act.threshold,
    "to": each.to,
    "transpose": shapes.transpose,
    "var": reductions.var,
    "where": each.where,
}
