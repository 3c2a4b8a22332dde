"""Layers, first weights and training on the GPU's code path, on a stand-in for CuPy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpidl import nn, optim
from mpidl.array import is_device, to_numpy
from mpidl.autograd import Tensor, tensor
from mpidl.nn import init
from tests.unit.devices import assert_same, counts, device, installed

Rng = np.random.Generator


@pytest.fixture
def xp() -> Iterator[ModuleType]:
    with installed() as cupy:
        yield cupy


class Cross(nn.Module):
    """Attention to another sequence, under a mask."""

    def __init__(self) -> None:
        self.attention = nn.MultiHeadAttention(8, 2, dropout=0.5)

    def forward(self, x: Any) -> Tensor:
        mask = x.data[:, None, :, :3] > 0 if isinstance(x, Tensor) else x[:, None, :, :3] > 0
        return self.attention(x, mask, other=x[:, :3])


#: name -> how to make it, and the shape of an input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "AvgPool2d": (lambda: nn.AvgPool2d(2, 1, 1), (2, 3, 5, 6)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 2, 3)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (3, 4, 7, 6)),
    "Dropout": (lambda: nn.Dropout(0.3), (7, 5)),
    "Flatten": (nn.Flatten, (4, 3, 2)),
    "GELU": (nn.GELU, (200, 100)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "LeakyReLU": (nn.LeakyReLU, (5, 4)),
    "Linear": (lambda: nn.Linear(5, 3), (4, 2, 5)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1), (2, 3, 7, 6)),
    "MultiHeadAttention": (lambda: nn.MultiHeadAttention(8, 2, causal=True), (3, 4, 8)),
    "ReLU": (nn.ReLU, (200, 100)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (5, 4)),
    "Sigmoid": (nn.Sigmoid, (5, 4)),
    "Softmax": (nn.Softmax, (5, 4)),
    "Tanh": (nn.Tanh, (5, 4)),
    "Threshold": (lambda: nn.Threshold(0.2, -1.0), (5, 4)),
    "TransformerBlock": (lambda: nn.TransformerBlock(8, 2, dropout=0.2), (3, 4, 8)),
    "attention to another": (Cross, (3, 4, 8)),
}


def test_all_layers_stand_in_the_table() -> None:
    classes = {n for n in nn.__all__ if isinstance(getattr(nn, n), type)}
    others = {"Buffer", "Module", "Parameter", "Embedding"}  # the latter in the transformer below
    assert classes - others == LAYERS.keys() - {"attention to another"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_the_device(name: str, training: bool, xp: Any, rng: Rng) -> None:
    make, shape = LAYERS[name]
    model = make().train(training)
    there = copy.deepcopy(model).to("cuda")
    x = rng.normal(size=shape).astype(np.float32)
    inputs = tensor(x, requires_grad=True), Tensor(device(x), requires_grad=True)
    nn.seed(int(rng.integers(1000)))
    expected = model(inputs[0])
    expected.backward(np.ones_like(expected.data))
    ones, before = device(np.ones_like(expected.data)), counts()
    found = there(inputs[1])
    found.backward(ones)
    assert counts() == before, "the host waited for the GPU, or copied"
    assert_same(found.data, expected.data)
    assert_same(inputs[1].grad, inputs[0].grad)
    for key, value in there.named_state().items():
        other = model.named_state()[key]
        assert_same(value.data, other.data)
        if isinstance(value, nn.Parameter):
            assert_same(value.grad, other.grad)


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * 3 * 3, 5),
        )


class Transformer(nn.Module):
    def __init__(self) -> None:
        self.embedding = nn.Embedding(5, 8)
        self.block = nn.TransformerBlock(8, 2, dropout=0.1, causal=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Tensor:
        return self.head(self.block(self.embedding(x))).reshape(-1, 5)


def train(model: nn.Module, optimizer: Any, batches: list[Any]) -> list[Any]:
    """Make a step with each batch, and return the losses."""
    flat = [p.data.reshape(-1) for p in model.parameters()]
    states, losses = [optimizer.init(p) for p in flat], []
    for step, (x, labels) in enumerate(batches):
        nn.random.reseed(step)
        loss = nn.cross_entropy(model(x), labels, smoothing=0.1)
        loss.backward()
        for p, data, state in zip(model.parameters(), flat, states, strict=True):
            layers = optim.Layers([slice(None)], lambda values: np.array(values, np.float64))
            grad = p.grad.reshape(-1)
            optimizer.update(data, grad, state, step, layers, iter([(slice(None), grad)]))
            p.zero_grad()
        losses.append(loss.data)
    return losses


@pytest.mark.parametrize(
    "optimizer", [optim.SGD(0.1, 0.9, 0.01), optim.AdamW(0.01, eps=1e-3)], ids=str
)
@pytest.mark.parametrize("make", [Convolutional, Transformer])
def test_a_training_step_never_waits(make: Any, optimizer: Any, xp: Any, rng: Rng) -> None:
    model = make()
    there = copy.deepcopy(model).to("cuda")
    batches = []
    for _ in range(3):
        pictures = rng.normal(size=(4, 2, 6, 6)).astype(np.float32), rng.integers(0, 5, 4)
        tokens = rng.integers(0, 5, (4, 6)), rng.integers(0, 5, 24)
        batches.append(pictures if make is Convolutional else tokens)
    on_device = list(map(device, batches))
    before = counts()
    losses = train(there, optimizer, on_device)
    assert counts() == before, "the host waited for the GPU, or copied"
    for found, expected in zip(losses, train(model, optimizer, batches), strict=True):
        assert_same(found, expected)
    for key, value in there.named_state().items():
        found, expected = to_numpy(value.data), model.named_state()[key].data
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=key)


INITIALISERS: dict[str, Callable[[Any], Any]] = {
    "he_normal": init.he_normal,
    "he_uniform": lambda w: init.he_uniform(w, "fan_out", 0.1),
    "lecun_uniform": lambda w: init.lecun_uniform(w, 7),
    "normal": lambda w: init.normal(w, 1.0, 2.0),
    "ones": init.ones,
    "orthogonal": init.orthogonal,
    "uniform": init.uniform,
    "xavier_normal": init.xavier_normal,
    "xavier_uniform": init.xavier_uniform,
    "zeros": init.zeros,
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_on_the_device(name: str, xp: Any, rng: Rng) -> None:
    seed, host = int(rng.integers(1000)), np.empty((4, 3, 2), np.float32)
    there = nn.Parameter(device(host))
    nn.seed(seed)
    INITIALISERS[name](host)
    nn.seed(seed)
    assert INITIALISERS[name](there) is there
    assert_same(there.data, host)


def test_a_model_between_devices(xp: Any, rng: Rng) -> None:
    x, labels = rng.normal(size=(5, 4)).astype(np.float32), rng.integers(0, 3, 5)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    there = copy.deepcopy(model).to("cuda")
    np.testing.assert_allclose(there.predict(x, batch_size=2), model.predict(x), rtol=1e-5)
    state = {key: value + 1 for key, value in model.state_dict().items()}
    there.load_state_dict(state)
    for key, value in there.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    assert str(there.summary((1, 4))) == str(model.summary((1, 4)))
    logits = model(x)
    assert nn.accuracy(logits.to("cuda"), device(labels)) == nn.accuracy(logits, labels)
    back = there.to("cpu")
    assert not any(is_device(value.data) for value in back.named_state().values())
