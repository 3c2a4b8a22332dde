"""From what ran to a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from mpidl.errors import InvalidArgument
from mpidl.onnx.converters import CONVERTERS
from mpidl.onnx.graph import Graph
from mpidl.onnx.runs import lengths, run
from mpidl.weights import path_of, replacing

if TYPE_CHECKING:
    import os

    from mpidl.nn import Module
    from mpidl.onnx.runs import Runs, Seen

OPSET, IR = 17, 8  # the first with LayerNormalization; and the file format that came with it
LARGEST_BYTES = 2**31 - 1  # of a Protocol Buffers message


def export(model: Module, path: str | os.PathLike[str], example: Any, dynamic_batch: bool) -> None:
    """See `mpidl.onnx.export_onnx`."""
    path = path_of(path)
    examples = example if isinstance(example, tuple) else (example,)
    runs = run(model, examples, dynamic_batch)
    inputs = _names("input", len(runs.inputs), isinstance(example, tuple))
    outputs = _names("output", len(runs.outputs), len(runs.outputs) > 1)
    graph = Graph(model.named_state(), runs.sizes, [*inputs, *outputs], inputs[0])
    for seen, name in zip(runs.inputs, inputs, strict=True):
        graph.know(seen, name)
    _convert(graph, runs, outputs)
    proto = _model(type(model).__name__, graph, runs, inputs, outputs)
    onnx.checker.check_model(proto, full_check=True)
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(proto.SerializeToString())
    except OSError as error:
        raise InvalidArgument(f"export_onnx: cannot write {path}: {error}") from error


def _names(stem: str, count: int, numbered: bool) -> list[str]:
    return [f"{stem}_{i}" for i in range(count)] if numbered else [stem]


def _convert(graph: Graph, runs: Runs, outputs: list[str]) -> None:
    for number, step in enumerate(runs.steps):
        shapes = ", ".join(str(getattr(x[0], "shape", x[0])) for x in step.inputs)
        graph.doing = f"operation {number}, {step.name} of {shapes}"
        converter = CONVERTERS.get(step.name)
        if converter is None:
            raise graph.refusal("it has no counterpart in mpidl/onnx/converters.py")
        graph.know(step.result, converter(graph, step))
    for seen, name in zip(runs.outputs, outputs, strict=True):
        graph.doing = f"the {name}"
        value = graph.value(seen)
        graph.nodes.append(helper.make_node("Identity", [value], [name], name=f"to_{name}"))


def _model(
    name: str, graph: Graph, runs: Runs, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    from mpidl import __version__

    size = sum(t.ByteSize() for t in graph.initializers)
    if size > LARGEST_BYTES:
        raise InvalidArgument(
            f"export_onnx: {size} bytes of weights: expected at most {LARGEST_BYTES}, as an ONNX "
            "file holds; float16 weights, by model.astype('float16'), take half of float32"
        )
    given = [_describe(n, x, runs.sizes) for n, x in zip(inputs, runs.inputs, strict=True)]
    made = [_describe(n, x, runs.sizes) for n, x in zip(outputs, runs.outputs, strict=True)]
    return helper.make_model(
        helper.make_graph(graph.nodes, name, given, made, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="mpidl",
        producer_version=__version__,
    )


def _describe(name: str, seen: Seen, sizes: tuple[int, ...]) -> onnx.ValueInfoProto:
    shape: list[Any] = []
    for axis in lengths(seen):
        varies = len(set(axis)) > 1
        shape.append(("batch" if axis == sizes else None) if varies else axis[0])
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(seen[0].dtype)), shape
    )
