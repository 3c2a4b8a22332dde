"""The one table of converters: from an operation of `mpidl.autograd.OPS` to nodes of ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.onnx import elementwise as each
from mpidl.onnx import layers, reductions, shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.onnx.graph import Graph
    from mpidl.onnx.runs import Step

#: Each writes nodes for a step, and returns the name of the result.
CONVERTERS: dict[str, Callable[[Graph, Step], str]] = {
    "abs": each.plain("Abs"),
    "add": each.plain("Add"),
    "astype": each.convert,
    "attention": layers.attention,
    "avg_pool2d": layers.avg_pool2d,
    "batch_norm": layers.batch_norm,
    "binary_cross_entropy": reductions.binary_cross_entropy,
    "broadcast": shapes.broadcast,
    "clip": each.clip,
    "concatenate": shapes.concatenate,
    "conv2d": layers.conv2d,
    "cos": each.plain("Cos"),
    "cross_entropy": reductions.cross_entropy,
    "divide": each.plain("Div"),
    "dropout": each.dropout,
    "einsum": layers.einsum,
    "embedding": layers.embedding,
    "exp": each.plain("Exp"),
    "gelu": each.gelu,
    "getitem": shapes.getitem,
    "kl": reductions.kl,
    "l1": reductions.l1,
    "layer_norm": layers.layer_norm,
    "leaky_relu": each.leaky_relu,
    "linear": layers.linear,
    "log": each.plain("Log"),
    "log_softmax": reductions.softmax("LogSoftmax"),
    "matmul": each.plain("MatMul"),
    "max": reductions.reduction("ReduceMax"),
    "max_pool2d": layers.max_pool2d,
    "maximum": each.plain("Max"),
    "mean": reductions.reduction("ReduceMean"),
    "min": reductions.reduction("ReduceMin"),
    "minimum": each.plain("Min"),
    "mse": reductions.mse,
    "multiply": each.plain("Mul"),
    "negative": each.plain("Neg"),
    "pad": shapes.pad,
    "power": each.plain("Pow"),
    "relu": each.plain("Relu"),
    "reshape": shapes.reshape,
    "self_attention": layers.self_attention,
    "sigmoid": each.plain("Sigmoid"),
    "sin": each.plain("Sin"),
    "softmax": reductions.softmax("Softmax"),
    "sqrt": each.plain("Sqrt"),
    "stack": shapes.stack,
    "subtract": each.plain("Sub"),
    "sum": reductions.reduction("ReduceSum"),
    "tanh": each.plain("Tanh"),
    "threshold": each.threshold,
    "to": each.convert,
    "transpose": shapes.transpose,
    "var": reductions.var,
    "where": each.where,
}
