"""Every layer and loss against PyTorch: values, gradients, running statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as their

from mpidl import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

Rng = np.random.Generator
RENAMED = {  # where PyTorch has another name
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out.weight": "self_attn.out_proj.weight",
    "attention.out.bias": "self_attn.out_proj.bias",
    "mlp.0.weight": "linear1.weight",
    "mlp.0.bias": "linear1.bias",
    "mlp.2.weight": "linear2.weight",
    "mlp.2.bias": "linear2.bias",
    "qkv.weight": "in_proj_weight",
    "qkv.bias": "in_proj_bias",
    "out.weight": "out_proj.weight",
    "out.bias": "out_proj.bias",
}


def size(rng: Rng, low: int = 1, high: int = 6) -> int:
    return int(rng.integers(low, high))


def normal(rng: Rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def linear(rng: Rng) -> Any:
    n, length, k, m = (size(rng) for _ in range(4))
    bias = bool(rng.integers(2))
    return nn.Linear(k, m, bias=bias), torch.nn.Linear(k, m, bias=bias), normal(rng, n, length, k)


def conv(rng: Rng) -> Any:
    groups, kernel = size(rng, 1, 4), (size(rng, 1, 4), size(rng, 1, 4))
    inputs, outputs = groups * size(rng, 1, 3), groups * size(rng, 1, 3)
    options: dict[str, Any] = {
        "stride": (size(rng, 1, 4), size(rng, 1, 4)),
        "padding": size(rng, 0, 3),
        "dilation": (size(rng, 1, 3), size(rng, 1, 3)),
        "groups": groups,
        "bias": bool(rng.integers(2)),
    }
    x = normal(rng, size(rng), inputs, size(rng, 5, 10), size(rng, 5, 10))
    ours = nn.Conv2d(inputs, outputs, kernel, **options)
    return ours, torch.nn.Conv2d(inputs, outputs, kernel, **options), x


def pool(ours: Any, theirs: Any) -> Callable[[Rng], Any]:
    def make(rng: Rng) -> Any:
        window = (size(rng, 1, 4), size(rng, 1, 4))
        stride = None if rng.integers(2) else (size(rng, 1, 4), size(rng, 1, 4))
        padding = tuple(int(rng.integers(0, w // 2 + 1)) for w in window)
        x = normal(rng, size(rng), size(rng), size(rng, 4, 9), size(rng, 4, 9))
        return ours(window, stride, padding), theirs(window, stride, padding), x

    return make


def batch_norm(ours: Any, theirs: Any, axes: int) -> Callable[[Rng], Any]:
    def make(rng: Rng) -> Any:
        c = size(rng)
        x = normal(rng, *(size(rng, 2) for _ in range(axes)))
        x = np.repeat(x[:, :1], c, axis=1) + normal(rng, *x.shape[:1], c, *x.shape[2:])
        eps, momentum = float(rng.uniform(1e-5, 0.1)), float(rng.uniform())
        return ours(c, eps, momentum), theirs(c, eps, momentum), x * 3 + 10

    return make


def layer_norm(rng: Rng) -> Any:
    width = size(rng, 2)
    return nn.LayerNorm(width), torch.nn.LayerNorm(width), normal(rng, size(rng), 3, width) + 5


def elementwise(ours: nn.Module, theirs: Any) -> Callable[[Rng], Any]:
    return lambda rng: (ours, theirs, normal(rng, size(rng), size(rng), size(rng)) * 2)


def block(rng: Rng) -> Any:
    heads = size(rng, 1, 4)
    width, hidden = heads * size(rng, 1, 4), size(rng)
    ours = nn.TransformerBlock(width, heads, hidden=hidden)
    theirs = torch.nn.TransformerEncoderLayer(
        width, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return ours, theirs, normal(rng, size(rng), size(rng), width)


LAYERS: dict[str, Callable[[Rng], Any]] = {
    "AvgPool2d": pool(nn.AvgPool2d, torch.nn.AvgPool2d),
    "BatchNorm1d (n, c)": batch_norm(nn.BatchNorm1d, torch.nn.BatchNorm1d, 2),
    "BatchNorm1d (n, c, length)": batch_norm(nn.BatchNorm1d, torch.nn.BatchNorm1d, 3),
    "BatchNorm2d": batch_norm(nn.BatchNorm2d, torch.nn.BatchNorm2d, 4),
    "Conv2d": conv,
    "Flatten": elementwise(nn.Flatten(), torch.nn.Flatten()),
    "GELU": elementwise(nn.GELU(), torch.nn.GELU()),
    "GELU tanh": elementwise(nn.GELU("tanh"), torch.nn.GELU(approximate="tanh")),
    "LayerNorm": layer_norm,
    "LeakyReLU": elementwise(nn.LeakyReLU(0.3), torch.nn.LeakyReLU(0.3)),
    "Linear": linear,
    "MaxPool2d": pool(nn.MaxPool2d, torch.nn.MaxPool2d),
    "ReLU": elementwise(nn.ReLU(), torch.nn.ReLU()),
    "Sigmoid": elementwise(nn.Sigmoid(), torch.nn.Sigmoid()),
    "Softmax": elementwise(nn.Softmax(1), torch.nn.Softmax(1)),
    "Tanh": elementwise(nn.Tanh(), torch.nn.Tanh()),
    "Threshold": elementwise(nn.Threshold(0.4, -1.5), torch.nn.Threshold(0.4, -1.5)),
    "TransformerBlock": block,
}


def pair_up(ours: nn.Module, theirs: torch.nn.Module, rng: Rng) -> dict[str, Any]:
    """Give both the same random weights, in float64. Returns our name -> their parameter."""
    ours.astype(np.float64)
    theirs.double()
    state = dict(theirs.state_dict(keep_vars=True))
    found = {}
    for name, tensor in ours.named_state().items():
        found[name] = state[RENAMED.get(name, name)]
        values = rng.uniform(0.5, 1.5, tensor.shape)  # positive, for running variances
        tensor.data[...] = values
        with torch.no_grad():
            found[name].copy_(torch.from_numpy(values))
    left = {k for k in state if not k.endswith("num_batches_tracked")}
    assert {RENAMED.get(name, name) for name in found} == left
    return found


def assert_alike(ours: Any, theirs: Any, what: str) -> None:
    assert ours.dtype == np.float64, what
    expected = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * scale, err_msg=what)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, mode: str, rng: Rng) -> None:
    ours, theirs, x = LAYERS[name](rng)
    partner = pair_up(ours, theirs, rng)
    ours.train(mode == "train")
    theirs.train(mode == "train")
    for _ in range(2):  # running statistics move twice
        ours_x, their_x = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
        y, expected = ours(ours_x), theirs(their_x)
        assert y.shape == expected.shape
        assert_alike(y.data, expected, "output")
        weights = normal(rng, *y.shape)
        for parameter in ours.parameters():
            parameter.zero_grad()
        theirs.zero_grad()
        y.backward(weights)
        expected.backward(torch.from_numpy(weights))
        assert_alike(ours_x.grad, their_x.grad, "gradient of the input")
        for key, parameter in ours.named_parameters().items():
            assert_alike(parameter.grad, partner[key].grad, f"gradient of {key}")
        for key, buffer in ours.named_buffers().items():
            assert_alike(buffer.data, partner[key], key)


def test_embedding(rng: Rng) -> None:
    count, width = size(rng), size(rng)
    ours, theirs = nn.Embedding(count, width), torch.nn.Embedding(count, width)
    partner = pair_up(ours, theirs, rng)
    indices = rng.integers(0, count, (size(rng), size(rng)))
    y, expected = ours(indices), theirs(torch.from_numpy(indices))
    assert_alike(y.data, expected, "output")
    weights = normal(rng, *y.shape)
    y.backward(weights)
    expected.backward(torch.from_numpy(weights))
    assert_alike(ours.weight.grad, partner["weight"].grad, "gradient")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "causal", "masked", "other", "other masked"])
def test_attention(kind: str, bias: bool, rng: Rng) -> None:
    heads = size(rng, 1, 4)
    width, n, length, keys = heads * size(rng, 1, 4), size(rng), size(rng), size(rng)
    ours = nn.MultiHeadAttention(width, heads, bias=bias, causal=kind == "causal")
    theirs = torch.nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
    partner = pair_up(ours, theirs, rng)
    inputs = [normal(rng, n, length, width)]
    if "other" in kind:
        inputs.append(normal(rng, n, keys, width))
    columns = inputs[-1].shape[1]
    allowed = None
    if kind == "causal":
        allowed = np.tril(np.ones((length, length), bool))
    elif "masked" in kind:
        allowed = rng.integers(0, 2, (length, columns)).astype(bool)
        allowed[:, int(rng.integers(columns))] = True  # a query that sees nothing: see below
    ours_in = [Tensor(x, requires_grad=True) for x in inputs]
    theirs_in = [torch.tensor(x, requires_grad=True) for x in inputs]
    y = ours(
        ours_in[0],
        None if kind == "causal" else allowed,
        other=ours_in[1] if len(ours_in) == 2 else None,
    )
    expected, _ = theirs(
        theirs_in[0],
        theirs_in[-1],
        theirs_in[-1],
        attn_mask=None if allowed is None else torch.from_numpy(~allowed),
    )
    assert_alike(y.data, expected, "output")
    weights = normal(rng, *y.shape)
    y.backward(weights)
    expected.backward(torch.from_numpy(weights))
    for a, b in zip(ours_in, theirs_in, strict=True):
        assert_alike(a.grad, b.grad, "gradient of the input")
    for key, parameter in ours.named_parameters().items():
        assert_alike(parameter.grad, partner[key].grad, f"gradient of {key}")


def test_a_query_that_may_look_at_nothing_finds_nothing(rng: Rng) -> None:
    layer = nn.MultiHeadAttention(4, 2).astype("float64")
    layer.out.bias.data[...] = normal(rng, 4)
    mask = np.ones((3, 3), bool)
    mask[1] = False
    y = layer(normal(rng, 2, 3, 4), mask)
    np.testing.assert_allclose(y.data[:, 1], np.broadcast_to(layer.out.bias.data, (2, 4)))


LOSSES: dict[str, tuple[Any, Any]] = {
    "mse": (nn.mse, their.mse_loss),
    "mse sum": (
        lambda x, t: nn.mse(x, t, reduction="sum"),
        lambda x, t: their.mse_loss(x, t, reduction="sum"),
    ),
    "l1": (nn.l1, their.l1_loss),
    "l1 sum": (
        lambda x, t: nn.l1(x, t, reduction="sum"),
        lambda x, t: their.l1_loss(x, t, reduction="sum"),
    ),
    "binary_cross_entropy": (nn.binary_cross_entropy, their.binary_cross_entropy_with_logits),
    "binary_cross_entropy sum": (
        lambda x, t: nn.binary_cross_entropy(x, t, reduction="sum"),
        lambda x, t: their.binary_cross_entropy_with_logits(x, t, reduction="sum"),
    ),
    "kl": (nn.kl, lambda x, t: their.kl_div(x, t, reduction="batchmean")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, rng: Rng) -> None:
    ours, theirs = LOSSES[name]
    x = normal(rng, size(rng), size(rng)) * 3
    target = rng.uniform(0, 1, x.shape)
    target[rng.uniform(size=x.shape) < 0.2] = 0
    compare_loss(lambda t: ours(t, target), lambda t: theirs(t, torch.from_numpy(target)), x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy(smoothing: float, rng: Rng) -> None:
    n, classes = size(rng), size(rng)
    labels = rng.integers(0, classes, n)
    compare_loss(
        lambda t: nn.cross_entropy(t, labels, smoothing=smoothing),
        lambda t: their.cross_entropy(t, torch.from_numpy(labels), label_smoothing=smoothing),
        normal(rng, n, classes) * 3,
    )


def compare_loss(ours: Any, theirs: Any, x: np.ndarray) -> None:
    ours_x, their_x = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    value, expected = ours(ours_x), theirs(their_x)
    assert_alike(value.data, expected, "loss")
    value.backward()
    expected.backward()
    assert_alike(ours_x.grad, their_x.grad, "gradient")


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding", "MultiHeadAttention"])
def test_first_weights_are_spread_like_theirs(kind: str, rng: Rng) -> None:
    """The same distributions: about equal standard deviations and largest values."""
    nn.seed(int(rng.integers(2**31)))
    torch.manual_seed(int(rng.integers(2**31)))
    make = {
        "Linear": (nn.Linear(300, 400), torch.nn.Linear(300, 400)),
        "Conv2d": (nn.Conv2d(64, 96, 3, groups=2), torch.nn.Conv2d(64, 96, 3, groups=2)),
        "Embedding": (nn.Embedding(300, 400), torch.nn.Embedding(300, 400)),
        "MultiHeadAttention": (nn.MultiHeadAttention(200, 4), torch.nn.MultiheadAttention(200, 4)),
    }
    ours, theirs = make[kind]
    state = theirs.state_dict()
    for name, parameter in ours.named_parameters().items():
        expected = state[RENAMED.get(name, name)].numpy()
        if expected.size > 1000:
            assert parameter.data.std() == pytest.approx(expected.std(), rel=0.05), name
        if kind != "Embedding":  # all others are bounded
            largest = np.abs(parameter.data).max()
            assert largest == pytest.approx(np.abs(expected).max(), rel=0.1), name
