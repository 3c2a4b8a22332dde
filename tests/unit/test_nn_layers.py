"""Layers on their own: gradients against differences, edge cases, arguments, how they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, nn
from mpidl.autograd import check_gradients
from mpidl.errors import InvalidArgument
from mpidl.nn.norm import moments

if TYPE_CHECKING:
    from collections.abc import Callable

Rng = np.random.Generator

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # name -> layer, input
    "AvgPool2d": (lambda: nn.AvgPool2d(2, 1, 1), (2, 2, 3, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm1d length": (lambda: nn.BatchNorm1d(3), (2, 3, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (3, 2, 2, 3)),
    "Conv2d": (lambda: nn.Conv2d(4, 2, (2, 3), padding=1, groups=2, stride=(1, 2)), (2, 4, 4, 3)),
    "Flatten": (nn.Flatten, (2, 3, 2)),
    "GELU": (nn.GELU, (3, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2), (3, 4)),
    "Linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "MaxPool2d": (lambda: nn.MaxPool2d((2, 1)), (2, 2, 4, 3)),
    "MultiHeadAttention": (lambda: nn.MultiHeadAttention(4, 2), (2, 3, 4)),
    "MultiHeadAttention causal": (lambda: nn.MultiHeadAttention(4, 1, causal=True), (2, 3, 4)),
    "ReLU": (nn.ReLU, (3, 4)),
    "Sigmoid": (nn.Sigmoid, (3, 4)),
    "Softmax": (lambda: nn.Softmax(0), (3, 4)),
    "Tanh": (nn.Tanh, (3, 4)),
    "Threshold": (lambda: nn.Threshold(0.0, 2.0), (3, 4)),
    "TransformerBlock": (lambda: nn.TransformerBlock(4, 2, hidden=3), (1, 3, 4)),
    "TransformerBlock ReLU": (
        lambda: nn.TransformerBlock(2, 1, hidden=3, activation=nn.Tanh, causal=True),
        (2, 3, 2),
    ),
}


def layer_and_input(name: str, rng: Rng) -> tuple[nn.Module, np.ndarray]:
    make, shape = LAYERS[name]
    layer = make().astype(np.float64)
    for tensor in layer.named_state().values():
        tensor.data[...] = rng.uniform(0.5, 1.5, tensor.shape) * rng.choice([-1, 1], tensor.shape)
    for name_, buffer in layer.named_buffers().items():
        if name_.endswith("var"):
            buffer.data[...] = np.abs(buffer.data)
    # away from 0, where some functions have a kink, and all apart, where maxima change places
    x = rng.permutation(np.arange(np.prod(shape)) + 0.5).reshape(shape) / 10
    return layer, x * rng.choice([-1, 1], shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, training: bool, rng: Rng) -> None:
    layer, x = layer_and_input(name, rng)
    layer.train(training)
    modules, parameters = layer.named_modules(), layer.named_parameters()
    places = [(modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in parameters]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        for (module, attribute), value in zip(places, values, strict=True):
            setattr(module, attribute, value)
        return layer(x)

    check_gradients(function, x, *[p.data.copy() for p in parameters.values()], tolerance=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_may_be_empty(name: str, rng: Rng) -> None:
    """A rank may have no sample; warnings are errors here."""
    layer, x = layer_and_input(name, rng)
    one, none = layer(x[:1] if "Batch" not in name else x), Tensor(x[:0], requires_grad=True)
    before = layer.state_dict()
    y = layer(none)
    assert y.shape == (0, *one.shape[1:])
    y.sum().backward()
    assert none.grad.shape == none.shape
    for parameter in layer.parameters():
        assert not parameter.grad.any()
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_float32(name: str, rng: Rng) -> None:
    layer, x = layer_and_input(name, rng)
    layer.astype(np.float32)
    given = Tensor(x.astype(np.float32), requires_grad=True)
    y = layer(given)
    y.sum().backward()
    found = {y.dtype, given.grad.dtype, *(p.grad.dtype for p in layer.parameters())}
    found |= {b.dtype for b in layer.buffers()}
    assert found == {np.dtype(np.float32)}


BAD: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Linear(0, 3), r"Linear\(0, 3\)"),
    (lambda: nn.Embedding(3, 0), r"Embedding\(3, 0\)"),
    (lambda: nn.Conv2d(0, 3, 3), r"Conv2d\(0, 3, .* positive sizes that the groups divide"),
    (lambda: nn.Conv2d(4, 6, 3, groups=4), r"Conv2d\(4, 6, kernel=3, groups=4\)"),
    (lambda: nn.Conv2d(6, 4, 3, groups=4), r"Conv2d\(6, 4, kernel=3, groups=4\)"),
    (lambda: nn.Conv2d(4, 4, 3, groups=0), "groups=0"),
    (lambda: nn.Conv2d(1, 1, 0), "kernel 0: expected one or two whole numbers from 1 on"),
    (lambda: nn.Conv2d(1, 1, (1, 2, 3)), r"kernel \(1, 2, 3\): expected one or two"),  # type: ignore[arg-type]
    (lambda: nn.Conv2d(1, 1, 1, stride=0), "stride 0"),
    (lambda: nn.Conv2d(1, 1, 1, padding=(0, -1)), r"padding \(0, -1\): .* from 0 on"),
    (lambda: nn.Conv2d(1, 1, 1, dilation=(1, 0)), "dilation"),
    (lambda: nn.Conv2d(1, 1, 1.5), "kernel 1.5"),  # type: ignore[arg-type]
    (lambda: nn.MaxPool2d(0), r"MaxPool2d\(0\): size 0"),
    (lambda: nn.AvgPool2d(2, 0), r"AvgPool2d\(2\): stride 0"),
    (lambda: nn.AvgPool2d((2, 3), padding=2), "padding 2: expected at most half the size"),
    (lambda: nn.Dropout(1.0), "Dropout: dropout rate 1.0: expected 0 <= rate < 1"),
    (lambda: nn.Dropout(-0.1), "rate -0.1"),
    (lambda: nn.Dropout(float("nan")), "rate nan"),
    (lambda: nn.BatchNorm1d(0), r"BatchNorm1d\(0, .* positive size"),
    (lambda: nn.BatchNorm2d(3, eps=-1.0), "eps=-1.0"),
    (lambda: nn.BatchNorm2d(3, momentum=1.5), "momentum=1.5"),
    (lambda: nn.LayerNorm(0), r"LayerNorm\(0"),
    (lambda: nn.MultiHeadAttention(6, 4), r"MultiHeadAttention\(6, 4\): .* multiple of the heads"),
    (lambda: nn.MultiHeadAttention(6, 0), r"MultiHeadAttention\(6, 0\)"),
    (lambda: nn.MultiHeadAttention(6, 2, dropout=1.0), "MultiHeadAttention: dropout rate 1.0"),
    (lambda: nn.TransformerBlock(6, 4), "multiple of the heads"),
    (lambda: nn.TransformerBlock(6, 2, hidden=0), r"Linear\(6, 0\)"),
    (lambda: nn.GELU("fast"), r"GELU\('fast'\): expected 'none' or 'tanh'"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_arguments_that_cannot_be(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (nn.BatchNorm1d(3), (2, 4), "2 or 3"),
        (nn.BatchNorm1d(3), (2, 3, 4, 5), "2 or 3"),
        (nn.BatchNorm2d(3), (2, 3), "4"),
        (nn.BatchNorm2d(3), (2, 4, 3, 3), "4"),
    ],
)
def test_batch_norm_names_the_shape_it_expects(
    layer: nn.Module, shape: tuple[int, ...], axes: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"\(3\): input of shape .* 3 channels .* of {axes}"):
        layer(np.zeros(shape, np.float32))


def test_one_element_a_channel_moves_no_running_statistics() -> None:
    layer = nn.BatchNorm1d(2)
    layer.bias.data[...] = [1, 2]
    np.testing.assert_array_equal(layer(np.ones((1, 2), np.float32)).data, [[1, 2]])
    np.testing.assert_array_equal(layer.running_mean.data, [0, 0])
    np.testing.assert_array_equal(layer.running_var.data, [1, 1])


@pytest.mark.parametrize("shape", [(500, 3), (50, 3, 11), (20, 3, 5, 6)])
@pytest.mark.parametrize("last", [True, False])
def test_moments_far_from_zero(shape: tuple[int, ...], last: bool, rng: Rng) -> None:
    """One pass about 0 would find the variance to 4 digits, or a negative one."""
    x = rng.standard_normal(shape) + 1e6
    if last:  # channels last in memory, as convolutions leave it
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    axes = (0, *range(2, x.ndim))
    exact = x - x.mean(axes, keepdims=True, dtype=np.longdouble)
    count, mean, var = moments(x, None)
    assert count == x.size / 3
    np.testing.assert_allclose(mean, x.mean(axes), rtol=1e-14)
    np.testing.assert_allclose(var, (exact**2).mean(axes).astype(float), rtol=1e-12)


@pytest.mark.parametrize("last", [True, False])
def test_moments_of_many_float32(last: bool, rng: Rng) -> None:
    """Rounding errors do not grow with the batch: a plain sum of squares is off by 1e-5 here."""
    x = (rng.standard_normal((256, 2, 32, 32)) + 10).astype(np.float32)
    if last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    _, mean, var = moments(x, None)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(var, exact.var((0, 2, 3)), rtol=2e-6)


def test_moments_of_float32_far_from_zero(rng: Rng) -> None:
    """The mean need not be a float32: here these lie 0.06 apart."""
    x = (rng.standard_normal((500, 3)) + 1e6).astype(np.float32)
    _, mean, var = moments(x, None)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(var, exact.var(axis=0), rtol=1e-6)


def test_moments_of_float16_do_not_overflow(rng: Rng) -> None:
    x = (rng.standard_normal((40, 2, 30, 30)) + 100).astype(np.float16)
    _, mean, var = moments(x, None)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(var, exact.var((0, 2, 3)), rtol=1e-2)


def test_of_a_constant_the_variance_is_zero() -> None:
    _, mean, var = moments(np.full((7, 2), 0.1, np.float32), None)
    np.testing.assert_allclose(mean, 0.1, rtol=1e-7)
    np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_drops_the_share_asked_for_and_keeps_the_mean(dtype: Any, rng: Rng) -> None:
    p = float(rng.uniform(0.2, 0.8))
    nn.seed(int(rng.integers(2**31)))
    x = Tensor(rng.uniform(1, 2, (300, 400)).astype(dtype), requires_grad=True)
    y = nn.Dropout(p)(x)
    kept = y.data != 0
    assert kept.mean() == pytest.approx(1 - p, abs=0.01)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.data[kept], x.data[kept] / (1 - p), rtol=np.finfo(dtype).eps * 4)
    y.sum().backward()
    np.testing.assert_allclose(x.grad, kept / (1 - p), rtol=1e-6)


def test_dropout_follows_the_key_and_not_what_ran_before(rng: Rng) -> None:
    layer, x = nn.Dropout(0.5), np.ones(1000, np.float32)
    nn.random.reseed(1, 2)
    first, second = layer(x).data, layer(x).data
    nn.random.reseed(1, 2)
    np.testing.assert_array_equal(layer(x).data, first)
    assert not np.array_equal(first, second)


def test_dropout_is_nothing_in_evaluation_or_at_rate_0() -> None:
    x = Tensor(np.ones(3))
    assert nn.Dropout(0.5).eval()(x) is x
    assert nn.Dropout(0.0)(x) is x
    plain = np.ones(3)
    assert nn.Dropout(0.5).eval()(plain) is plain


def test_attention_drops_probabilities_in_training_only(rng: Rng) -> None:
    layer = nn.MultiHeadAttention(4, 2, dropout=0.5).astype(np.float64)
    x, other = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 5, 4))
    for more in ({}, {"other": other}):
        nn.random.reseed(1)
        first, second = layer.train()(x, **more).data, layer(x, **more).data
        nn.random.reseed(1)
        np.testing.assert_array_equal(layer(x, **more).data, first)
        assert not np.allclose(first, second)
        layer.eval()
        np.testing.assert_array_equal(layer(x, **more).data, layer(x, **more).data)
        expected = nn.MultiHeadAttention(4, 2).astype(np.float64)
        expected.load_state_dict(layer.state_dict())
        np.testing.assert_allclose(layer(x, **more).data, expected(x, **more).data)


def test_on_average_dropped_attention_is_attention(rng: Rng) -> None:
    layer = nn.MultiHeadAttention(4, 2, dropout=0.3).astype(np.float64)
    x = np.repeat(rng.standard_normal((1, 3, 4)), 20000, axis=0)
    mean = layer(x).data.mean(axis=0)
    np.testing.assert_allclose(mean, layer.eval()(x[:1]).data[0], atol=0.05)


def test_attention_to_itself_as_another_is_the_same(rng: Rng) -> None:
    layer = nn.MultiHeadAttention(6, 3, causal=True).astype(np.float64)
    x = rng.standard_normal((2, 5, 6))
    np.testing.assert_allclose(layer(x, other=x).data, layer(x).data, atol=1e-12)


def test_blocks_hand_on_their_mask(rng: Rng) -> None:
    block = nn.TransformerBlock(4, 2).astype(np.float64)
    x = rng.standard_normal((2, 3, 4))
    causal = nn.TransformerBlock(4, 2, causal=True).astype(np.float64)
    causal.load_state_dict(block.state_dict())
    np.testing.assert_allclose(block(x, np.tril(np.ones((3, 3), bool))).data, causal(x).data)
    assert not np.allclose(block(x).data, causal(x).data)


def test_layers_say_whether_their_forward_is_collective() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2))
    assert [m.sync for m in model.modules()] == [False] * 3
    assert nn.BatchNorm2d(3, sync=True).sync


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Linear(3, 4), "Linear(3, 4)"),
        (nn.Linear(3, 4, bias=False), "Linear(3, 4, bias=False)"),
        (nn.Embedding(3, 4), "Embedding(3, 4)"),
        (nn.Conv2d(3, 32, 3, padding=1), "Conv2d(3, 32, kernel=(3, 3), padding=(1, 1))"),
        (
            nn.Conv2d(4, 8, (1, 2), stride=2, dilation=3, groups=4, bias=False),
            "Conv2d(4, 8, kernel=(1, 2), stride=(2, 2), dilation=(3, 3), groups=4, bias=False)",
        ),
        (nn.MaxPool2d(2), "MaxPool2d(size=(2, 2))"),
        (nn.AvgPool2d(3, 2, 1), "AvgPool2d(size=(3, 3), stride=(2, 2), padding=(1, 1))"),
        (nn.Flatten(), "Flatten()"),
        (nn.Dropout(0.1), "Dropout(0.1)"),
        (nn.BatchNorm1d(3), "BatchNorm1d(3)"),
        (
            nn.BatchNorm2d(3, 0.1, 0.2, sync=True),
            "BatchNorm2d(3, eps=0.1, momentum=0.2, sync=True)",
        ),
        (nn.LayerNorm(3), "LayerNorm(3)"),
        (nn.LayerNorm(3, 0.1), "LayerNorm(3, eps=0.1)"),
        (nn.GELU(), "GELU()"),
        (nn.GELU("tanh"), "GELU(approximate='tanh')"),
        (nn.LeakyReLU(), "LeakyReLU(slope=0.01)"),
        (nn.Softmax(1), "Softmax(axis=1)"),
        (nn.Threshold(0.5, 2), "Threshold(0.5, 2)"),
        (
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())),
            "Sequential(\n  (0): ReLU()\n  (1): Sequential(\n    (0): Tanh()\n  )\n)",
        ),
        (
            nn.MultiHeadAttention(4, 2, dropout=0.1, bias=False, causal=True),
            "MultiHeadAttention(4, 2, dropout=0.1, bias=False, causal=True\n"
            "  (qkv): Linear(4, 12, bias=False)\n  (out): Linear(4, 4, bias=False)\n)",
        ),
    ],
    ids=lambda v: v.split("\n")[0] if isinstance(v, str) else "",
)
def test_modules_print_their_arguments(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


def test_a_module_that_holds_itself_prints() -> None:
    parent, child = nn.Module(), nn.Module()
    parent.child, child.parent = child, parent  # type: ignore[attr-defined]
    assert repr(parent) == "Module(\n  (child): Module(\n    (parent): ...\n  )\n)"
