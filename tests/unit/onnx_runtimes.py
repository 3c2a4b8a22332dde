"""Exporting a model, and running its file in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import openvino

from mpidl import Tensor, nn
from mpidl.autograd import no_grad
from mpidl.onnx import export_onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from mpidl.array import Array

TOLERANCE = 1e-5
CORE = openvino.Core()
SETTINGS = {  # on some processors it would compute in bfloat16
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
}


class Apply(nn.Module):
    """A function of tensors as a model; it may have a state besides."""

    def __init__(self, function: Callable[..., Any], **state: nn.Parameter | nn.Buffer) -> None:
        self.function = function
        vars(self).update(state)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def run_everywhere(path: Path, inputs: tuple[Array, ...]) -> dict[str, list[Array]]:
    """Return the outputs that each runtime makes of `inputs`, given in the file's order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    named = {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)}
    compiled = CORE.compile_model(str(path), "CPU", SETTINGS)
    found = compiled(named)
    return {
        "ONNX Runtime": session.run(None, named),
        "OpenVINO": [found[output] for output in compiled.outputs],
    }


def expect_agreement(
    model: nn.Module,
    path: Path,
    make: Callable[[int], tuple[Array, ...]],
    *,
    n: int = 3,
    batches: Iterable[int] = (1, 3, 5),
) -> None:
    """Export for an example `make(n)`; the file must give what the model gives for all batches."""
    example = make(n)
    export_onnx(model, path, example if len(example) > 1 else example[0])
    model.eval()
    for size in batches:
        inputs = make(size)
        with no_grad():
            expected = model(*(x if x.dtype.kind == "b" else Tensor(x) for x in inputs))
        values = expected if isinstance(expected, tuple) else (expected,)
        for runtime, outputs in run_everywhere(path, inputs).items():
            for value, output in zip(values, outputs, strict=True):
                what = f"{runtime}, a batch of {size}"
                assert output.shape == value.shape, what
                assert output.dtype == value.dtype, what
                np.testing.assert_allclose(
                    output, value.data, rtol=TOLERANCE, atol=TOLERANCE, err_msg=what
                )
