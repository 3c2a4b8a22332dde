"""Models as ONNX files: every layer, whole models, names, and what cannot be exported."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from mpidl import Tensor, functional, nn
from mpidl.errors import InvalidArgument
from mpidl.onnx import export_onnx
from tests.unit.onnx_runtimes import Apply, expect_agreement, run_everywhere

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpidl.array import Array

Rng = np.random.Generator


def floats(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def shuffled(model: nn.Module, rng: Rng) -> nn.Module:
    """Give every parameter and buffer fresh values, such as training might."""
    for tensor in model.named_state().values():
        tensor.data[...] = rng.uniform(0.2, 1, tensor.shape) * rng.choice([-1, 1], tensor.shape)
    for tensor in model.buffers():  # variances among them
        np.abs(tensor.data, out=tensor.data)
    return model


def size(rng: Rng) -> int:
    return int(rng.integers(2, 6))


#: layer -> (the layer, the shape of a sample)
LAYERS: dict[str, Callable[[Rng], tuple[nn.Module, tuple[int, ...]]]] = {
    "AvgPool2d": lambda rng: (nn.AvgPool2d((2, 3), 2, padding=1), (size(rng), 7, 8)),
    "BatchNorm1d": lambda rng: (nn.BatchNorm1d(c := size(rng)), (c, size(rng))),
    "BatchNorm2d": lambda rng: (nn.BatchNorm2d(c := size(rng)), (c, size(rng), size(rng))),
    "Conv2d": lambda rng: (
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1), groups=2),
        (4, 7, 4 + size(rng)),
    ),
    "Dropout": lambda rng: (nn.Dropout(0.5), (size(rng),)),
    "Flatten": lambda rng: (nn.Flatten(), (size(rng), size(rng), 2)),
    "GELU": lambda rng: (nn.GELU(), (size(rng),)),
    "LayerNorm": lambda rng: (nn.LayerNorm(w := size(rng)), (size(rng), w)),
    "LeakyReLU": lambda rng: (nn.LeakyReLU(0.2), (size(rng), 2)),
    "Linear": lambda rng: (nn.Linear(w := size(rng), size(rng)), (w,)),
    "MaxPool2d": lambda rng: (nn.MaxPool2d(3, 2, padding=1), (size(rng), 8, 7)),
    "MultiHeadAttention": lambda rng: (
        nn.MultiHeadAttention(8, 2, dropout=0.3, causal=bool(rng.integers(2))),
        (size(rng), 8),
    ),
    "ReLU": lambda rng: (nn.ReLU(), (size(rng),)),
    "Sequential": lambda rng: (nn.Sequential(nn.Linear(3, 2), nn.Tanh()), (size(rng), 3)),
    "Sigmoid": lambda rng: (nn.Sigmoid(), (size(rng),)),
    "Softmax": lambda rng: (nn.Softmax(axis=1), (size(rng), size(rng))),
    "Tanh": lambda rng: (nn.Tanh(), (size(rng),)),
    "Threshold": lambda rng: (nn.Threshold(0.3, -2.0), (size(rng),)),
    "TransformerBlock": lambda rng: (nn.TransformerBlock(8, 4, dropout=0.2), (size(rng), 8)),
}


class Cross(nn.Module):
    """Attention to another sequence."""

    def __init__(self) -> None:
        self.attention = nn.MultiHeadAttention(6, 3)

    def forward(self, x: Any, other: Any, mask: Any) -> Any:
        return self.attention(x, other=other, mask=mask[:, None, None, :]), other * 2


class Language(nn.Module):
    """A small transformer with positions, a padding mask and tied embeddings."""

    def __init__(self) -> None:
        self.tokens, self.places = nn.Embedding(13, 8), nn.Parameter(np.zeros((9, 8), np.float32))
        self.blocks = [nn.TransformerBlock(8, 2, causal=True) for _ in range(2)]
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Any, mask: Any) -> Any:
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.norm(x) @ self.tokens.weight.T


class Recurrent(nn.Module):
    """A state that starts as zeros, and goes over the places one by one."""

    def __init__(self) -> None:
        self.into, self.back = nn.Linear(3, 5), nn.Linear(5, 5, bias=False)

    def forward(self, x: Any) -> Any:
        h = np.zeros((len(x), 5), np.float32)
        for t in range(x.shape[1]):
            h = functional.tanh(self.into(x[:, t]) + self.back(h))
        return h


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(8, 5),
        nn.Softmax(),
    )


def test_each_layer_is_tested() -> None:
    layers = {name for name in nn.__all__ if name[0].isupper()}
    assert layers - {"Buffer", "Module", "Parameter"} == {*LAYERS, "Embedding"}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, rng: Rng, tmp_path: Path) -> None:
    layer, sample = LAYERS[name](rng)
    make = lambda n: (floats(rng, n, *sample),)  # noqa: E731
    expect_agreement(shuffled(layer, rng), tmp_path / "layer.onnx", make, n=size(rng))


@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_embedding_takes_whole_numbers(kind: Any, rng: Rng, tmp_path: Path) -> None:
    layer = nn.Embedding(5, 3)
    make = lambda n: (rng.integers(0, 5, (n, 2)).astype(kind),)  # noqa: E731
    expect_agreement(layer, tmp_path / "layer.onnx", make)
    given = onnx.load(tmp_path / "layer.onnx").graph.input[0].type.tensor_type
    assert onnx.helper.tensor_dtype_to_np_dtype(given.elem_type) == kind


def test_a_convolutional_network(rng: Rng, tmp_path: Path) -> None:
    model = shuffled(pictures(), rng)
    expect_agreement(model, tmp_path / "cnn.onnx", lambda n: (floats(rng, n, 3, 8, 8),), n=1)


def test_a_transformer_with_a_mask(rng: Rng, tmp_path: Path) -> None:
    def make(n: int) -> tuple[Array, ...]:
        return rng.integers(0, 13, (n, 6)), np.arange(6) < rng.integers(1, 7, (n, 1))

    expect_agreement(shuffled(Language(), rng), tmp_path / "language.onnx", make)


def test_several_inputs_and_outputs(rng: Rng, tmp_path: Path) -> None:
    def make(n: int) -> tuple[Array, ...]:
        return floats(rng, n, 2, 6), floats(rng, n, 4, 6), rng.random((n, 4)) < 0.6

    expect_agreement(shuffled(Cross(), rng), tmp_path / "cross.onnx", make)
    graph = onnx.load(tmp_path / "cross.onnx").graph
    assert [i.name for i in graph.input] == ["input_0", "input_1", "input_2"]
    assert [o.name for o in graph.output] == ["output_0", "output_1"]


def test_a_loop_over_places(rng: Rng, tmp_path: Path) -> None:
    expect_agreement(Recurrent(), tmp_path / "loop.onnx", lambda n: (floats(rng, n, 4, 3),))


def test_an_input_of_another_length_than_the_batch_is_of_fixed_shape(
    rng: Rng, tmp_path: Path
) -> None:
    make = lambda n: (floats(rng, n, 2), floats(rng, 7, 2))  # noqa: E731
    expect_agreement(Apply(lambda x, y: x @ y.T), tmp_path / "model.onnx", make)
    shapes = [
        [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in onnx.load(tmp_path / "model.onnx").graph.input
    ]
    assert shapes == [["batch", 2], [7, 2]]


def test_names_shapes_and_values_in_the_file(rng: Rng, tmp_path: Path) -> None:
    model, path = shuffled(pictures(), rng), tmp_path / "cnn.onnx"
    export_onnx(model, str(path), Tensor(floats(rng, 2, 3, 8, 8)))
    graph = onnx.load(path).graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    state = model.state_dict()
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name], value)
    assert {n for n in tensors if not n.startswith("constant")} == set(state)
    for value, name, shape in (
        (graph.input[0], "input", ["batch", 3, 8, 8]),
        (graph.output[0], "output", ["batch", 5]),
    ):
        assert value.name == name
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == shape


def test_a_parameter_may_be_called_input(rng: Rng, tmp_path: Path) -> None:
    state = {name: nn.Parameter(floats(rng, 2)) for name in ("input", "output", "add")}
    model = Apply(lambda x: x + state["input"] + state["output"] * state["add"], **state)
    expect_agreement(model, tmp_path / "model.onnx", lambda n: (floats(rng, n, 2),))


def test_a_fixed_batch(rng: Rng, tmp_path: Path) -> None:
    """Where the model cannot run on another one: told, and exported on demand."""
    weight = floats(rng, 3, 3)
    model, path, x = Apply(lambda x: weight @ x), tmp_path / "model.onnx", floats(rng, 3, 2)
    with pytest.raises(InvalidArgument, match=r"ran on a batch of 3, but not of 4.*dynamic_batch"):
        export_onnx(model, path, x)
    export_onnx(model, path, x, dynamic_batch=False)
    for (found,) in run_everywhere(path, (x,)).values():
        np.testing.assert_allclose(found, weight @ x, rtol=1e-5, atol=1e-5)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_modes_and_weights_stay_as_they_were(rng: Rng, tmp_path: Path) -> None:
    model = pictures()
    model.layers[1].eval()
    modes, before = [m.training for m in model.modules()], model.state_dict()
    export_onnx(model, tmp_path / "cnn.onnx", floats(rng, 2, 3, 8, 8))
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_the_input_is_converted_to_the_dtype_of_the_weights(rng: Rng, tmp_path: Path) -> None:
    export_onnx(nn.Linear(3, 2), tmp_path / "model.onnx", rng.standard_normal((2, 3)))
    (tensor,) = onnx.load(tmp_path / "model.onnx").graph.input
    assert tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def random_noise(x: Any) -> Any:
    return x + np.random.default_rng().standard_normal(2).astype(np.float32)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a condition on values": (
        lambda x: functional.where(x > 0, x, 1),
        r"operation 0, where of \(3, 2\), 1: an array of shape \(3, 2\) was computed from the inp",
    ),
    "NumPy behind the back": (
        lambda x: x * np.concatenate([x.data, x.data])[:1],
        r"multiply of \(3, 2\), \(1, 2\): an array of shape \(1, 2\) was computed from the input",
    ),
    "a number from the values": (
        lambda x: x * float(x.data.max()),
        r"multiply of .*: a number is .* for batches of 3, 4, 6, with other values",
    ),
    "a path that depends on values": (
        lambda x: x.exp() if abs(float(x.data[0, 0])) > 0.97 else x.sqrt(),
        r"operation 0 is exp for a batch of 3, and sqrt for other values and a batch of 4",
    ),
    "a path that depends on the batch": (
        lambda x: x if len(x) == 3 else x * 2,
        r"0 operations for a batch of 3, 1 for",
    ),
    "random numbers": (random_noise, r"an array of shape \(2,\) is another one .* it is random"),
    "a length that is no linear function": (
        lambda x: functional.broadcast_to(x[0], (len(x) ** 2, 2)),
        r"broadcast .*: a length is 9, 16, 36 for batches of 3, 4, 6: expected a linear function",
    ),
    "an option that varies": (
        lambda x: functional.leaky_relu(x, 1 / len(x)),
        r"leaky_relu .*: slope is 0.333.* for a batch of 3, 0.166.* for others",
    ),
    "a mask from the input": (
        lambda x: x[x.data > 0],
        "getitem .*: a mask from the input gives a shape that depends on values",
    ),
    "nothing at all": (
        lambda x: x[:, :0].reshape(0, len(x)),
        r"operation 1, reshape of \(3, 0\): the shape \(0, 3\) has no elements",
    ),
    "no tensor": (lambda x: {"y": x}, "the model returned a dict: expected a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_named(name: str, tmp_path: Path) -> None:
    function, message = REFUSED[name]
    with pytest.raises(InvalidArgument, match=message):
        export_onnx(Apply(function), tmp_path / "model.onnx", np.ones((3, 2), np.float32))
    assert not list(tmp_path.iterdir())


def test_arrays_without_values_of_the_input_are_constants(rng: Rng, tmp_path: Path) -> None:
    def function(x: Tensor) -> Tensor:
        return x + np.ones_like(x.data) + np.full((len(x), 1), 0.5, np.float32)

    expect_agreement(Apply(function), tmp_path / "model.onnx", lambda n: (floats(rng, n, 2),))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((1, 3), "an example of type int: expected an array"),
        (np.ones((0, 3), np.float32), "expected an example of one sample or more"),
        (np.float32(1), "an example of type float32"),
        ((), "expected an example of one sample or more"),
    ],
)
def test_examples_that_cannot_be(example: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        export_onnx(nn.Linear(3, 2), tmp_path / "model.onnx", example)


def test_a_file_that_cannot_be_written(rng: Rng, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "model.onnx"
    with pytest.raises(InvalidArgument, match=r"cannot write .*missing/model.onnx: .*No such file"):
        export_onnx(nn.Linear(3, 2), path, floats(rng, 1, 3))


def test_without_the_extra() -> None:
    code = """
import sys
sys.modules["onnx"] = None
import numpy as np
from mpidl import nn
from mpidl.errors import MpidlError
from mpidl.onnx import export_onnx
try:
    export_onnx(nn.Linear(3, 2), "model.onnx", np.ones((1, 3), np.float32))
except MpidlError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'mpidl[onnx]'" in result.stdout


def test_the_package_onnx_is_imported_when_asked_for() -> None:
    code = "import sys, mpidl.onnx, mpidl.weights; print({'onnx', 'safetensors'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
