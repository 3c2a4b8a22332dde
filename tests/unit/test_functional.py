"""`mpidl.functional`: each function runs one operation, with the defaults that it documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, functional
from mpidl.autograd import OPS, trace

X = np.linspace(0.1, 0.9, 12).reshape(3, 4)
PICTURE = np.linspace(0, 1, 96).reshape(2, 3, 4, 4)
ROW = np.ones(4)
THREE = np.ones(3)
KERNEL = np.ones((2, 3, 2, 2))
MASK = X > 0.5
LABELS = np.array([0, 1, 2])
NONE = {"mask": None, "causal": False, "drop": None}
AXES = {"axis": None, "keepdims": False}
CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}

#: function, what it is called with, and what the operation is to get beside its inputs
CALLS: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
    "abs": (lambda: functional.abs(X), {}),
    "attention": (lambda: functional.attention(X, X, X), {**NONE, "scale": None}),
    "avg_pool2d": (
        lambda: functional.avg_pool2d(PICTURE, 2),
        {"size": 2, "stride": None, "padding": 0},
    ),
    "batch_norm": (
        lambda: functional.batch_norm(X, ROW, ROW, mean=ROW, var=ROW),
        {"mean": ROW, "var": ROW, "eps": 1e-5, "count": None, "total": None},
    ),
    "binary_cross_entropy": (
        lambda: functional.binary_cross_entropy(X, X),
        {"target": X, "reduction": "mean"},
    ),
    "broadcast_to": (lambda: functional.broadcast_to(X, (2, 3, 4)), {"shape": (2, 3, 4)}),
    "clip": (lambda: functional.clip(X, 0.3), {"low": 0.3, "high": None}),
    "concatenate": (lambda: functional.concatenate([X, X]), {"axis": 0}),
    "conv2d": (lambda: functional.conv2d(PICTURE, KERNEL), CONV),
    "cos": (lambda: functional.cos(X), {}),
    "cross_entropy": (
        lambda: functional.cross_entropy(X, LABELS),
        {"labels": LABELS, "smoothing": 0.0},
    ),
    "dropout": (lambda: functional.dropout(X, MASK), {"mask": MASK}),
    "einsum": (lambda: functional.einsum("ij,kj", X, X), {"subscripts": "ij,kj"}),
    "embedding": (lambda: functional.embedding(LABELS, X), {"indices": LABELS}),
    "exp": (lambda: functional.exp(X), {}),
    "gelu": (lambda: functional.gelu(X), {"approximate": "none"}),
    "kl": (lambda: functional.kl(X, X), {"target": X}),
    "l1": (lambda: functional.l1(X, X), {"target": X, "reduction": "mean"}),
    "layer_norm": (lambda: functional.layer_norm(X, ROW, ROW), {"eps": 1e-5}),
    "leaky_relu": (lambda: functional.leaky_relu(X), {"slope": 0.01}),
    "linear": (lambda: functional.linear(X, X), {}),
    "log": (lambda: functional.log(X), {}),
    "log_softmax": (lambda: functional.log_softmax(X), {"axis": -1}),
    "matmul": (lambda: functional.matmul(X, X.T), {}),
    "max": (lambda: functional.max(X), AXES),
    "max_pool2d": (
        lambda: functional.max_pool2d(PICTURE, 2),
        {"size": 2, "stride": None, "padding": 0},
    ),
    "maximum": (lambda: functional.maximum(X, 0.5), {}),
    "mean": (lambda: functional.mean(X), AXES),
    "min": (lambda: functional.min(X), AXES),
    "minimum": (lambda: functional.minimum(X, 0.5), {}),
    "mse": (lambda: functional.mse(X, X), {"target": X, "reduction": "mean"}),
    "pad": (lambda: functional.pad(X, [(0, 1)] * 2), {"widths": [(0, 1)] * 2, "value": 0.0}),
    "relu": (lambda: functional.relu(X), {}),
    "reshape": (lambda: functional.reshape(X, (4, 3)), {"shape": (4, 3)}),
    "self_attention": (
        lambda: functional.self_attention(X.reshape(1, 2, 6), 2),
        {**NONE, "heads": 2},
    ),
    "sigmoid": (lambda: functional.sigmoid(X), {}),
    "sin": (lambda: functional.sin(X), {}),
    "softmax": (lambda: functional.softmax(X), {"axis": -1}),
    "sqrt": (lambda: functional.sqrt(X), {}),
    "stack": (lambda: functional.stack([X, X]), {"axis": 0}),
    "sum": (lambda: functional.sum(X), AXES),
    "tanh": (lambda: functional.tanh(X), {}),
    "threshold": (lambda: functional.threshold(X, 0.2, 0.1), {"threshold": 0.2, "value": 0.1}),
    "transpose": (lambda: functional.transpose(X), {"axes": None}),
    "var": (lambda: functional.var(X), {**AXES, "correction": 0}),
    "where": (lambda: functional.where(MASK, X, 0.0), {"condition": MASK}),
}
RENAMED = {"broadcast_to": "broadcast"}
PUBLIC = sorted(
    name
    for name, value in vars(functional).items()
    if inspect.isfunction(value) and value.__module__ == functional.__name__ and name[0] != "_"
)


def test_every_function_is_tried() -> None:
    assert sorted(CALLS) == PUBLIC


def test_every_operation_can_be_reached() -> None:
    """As a function, as an operator of tensors, or as a method."""
    operators = {"add", "astype", "divide", "getitem", "multiply", "negative", "power", "subtract"}
    reached = {RENAMED.get(name, name) for name in PUBLIC} | operators | {"to"}
    assert reached == set(OPS)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_runs_the_operation_with_its_defaults(name: str) -> None:
    call, options = CALLS[name]
    with trace() as records:
        result = call()
    assert [r.name for r in records] == [RENAMED.get(name, name)]
    assert records[0].result is result
    assert set(records[0].options) == set(options)
    for key, value in options.items():
        found = records[0].options[key]
        assert found is value or found == value, key


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_says_what_it_does(name: str) -> None:
    assert getattr(functional, name).__doc__


def test_options_are_handed_on() -> None:
    x = Tensor(X)
    even = np.eye(2, dtype=bool)
    conv = {"stride": (1, 2), "padding": 1, "dilation": 2, "groups": 1}
    pool = {"stride": 1, "padding": (1, 0)}
    square = np.ones((1, 2, 6))
    calls: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: functional.sum(x, 1, keepdims=True), {"axis": 1, "keepdims": True}),
        (lambda: functional.mean(x, 0, keepdims=True), {"axis": 0, "keepdims": True}),
        (lambda: functional.max(x, (0, 1)), {"axis": (0, 1), "keepdims": False}),
        (lambda: functional.min(x, -1), {"axis": -1, "keepdims": False}),
        (
            lambda: functional.var(x, 1, correction=1, keepdims=True),
            {"axis": 1, "correction": 1, "keepdims": True},
        ),
        (lambda: functional.gelu(x, "tanh"), {"approximate": "tanh"}),
        (lambda: functional.leaky_relu(x, 0.5), {"slope": 0.5}),
        (lambda: functional.clip(x, high=0.5), {"low": None, "high": 0.5}),
        (lambda: functional.softmax(x, 0), {"axis": 0}),
        (lambda: functional.log_softmax(x, 0), {"axis": 0}),
        (lambda: functional.transpose(x, (1, 0)), {"axes": (1, 0)}),
        (lambda: functional.concatenate([x, X], 1), {"axis": 1}),
        (lambda: functional.stack([x, X], -1), {"axis": -1}),
        (lambda: functional.pad(x, [(1, 1)] * 2, 3.0), {"widths": [(1, 1)] * 2, "value": 3.0}),
        (lambda: functional.conv2d(PICTURE, KERNEL, np.ones(2), **conv), conv),
        (lambda: functional.max_pool2d(PICTURE, (2, 1), **pool), {"size": (2, 1), **pool}),
        (lambda: functional.avg_pool2d(PICTURE, (2, 1), **pool), {"size": (2, 1), **pool}),
        (lambda: functional.layer_norm(x, ROW, ROW, eps=0.1), {"eps": 0.1}),
        (lambda: functional.mse(x, X, reduction="sum"), {"target": X, "reduction": "sum"}),
        (lambda: functional.l1(x, X, reduction="sum"), {"target": X, "reduction": "sum"}),
        (
            lambda: functional.binary_cross_entropy(x, X, reduction="sum"),
            {"target": X, "reduction": "sum"},
        ),
        (
            lambda: functional.cross_entropy(x, LABELS, smoothing=0.2),
            {"labels": LABELS, "smoothing": 0.2},
        ),
        (
            lambda: functional.attention(x, x, x, mask=X[:, :3] > 0, causal=True, scale=2.0),
            {"causal": True, "scale": 2.0, "drop": None},
        ),
        (
            lambda: functional.self_attention(square, 1, mask=even, causal=True),
            {"heads": 1, "mask": even, "causal": True, "drop": None},
        ),
    ]
    for call, options in calls:
        with trace() as records:
            call()
        given = records[0].options
        assert {key: given[key] for key in options} == options, records[0].name


@pytest.mark.parametrize(
    "make",
    [
        lambda t: functional.cross_entropy(X, t(LABELS)),
        lambda t: functional.embedding(t(LABELS), X),
        lambda t: functional.where(t(MASK), X, 0.0),
        lambda t: functional.mse(X, t(X * 2)),
        lambda t: functional.l1(X, t(X * 2)),
        lambda t: functional.kl(X, t(X)),
        lambda t: functional.binary_cross_entropy(X, t(X)),
    ],
)
def test_targets_and_indices_may_be_tensors(make: Callable[..., Tensor]) -> None:
    np.testing.assert_array_equal(make(Tensor).data, make(np.asarray).data)


def test_a_target_that_requires_a_gradient_gets_none() -> None:
    x, target = Tensor(X, requires_grad=True), Tensor(X * 2, requires_grad=True)
    functional.mse(x, target).backward()
    assert x.grad is not None
    assert target.grad is None


METHODS = ("exp", "log", "sqrt", "abs", "sum", "mean", "var", "max", "min")


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_tensors_are_the_same_functions(name: str) -> None:
    np.testing.assert_array_equal(
        getattr(Tensor(X), name)().data, getattr(functional, name)(X).data
    )
    if name in ("sum", "mean", "var", "max", "min"):
        options: dict[str, Any] = {"keepdims": True}
        if name == "var":
            options["correction"] = 1
        found = getattr(Tensor(X), name)(0, **options).data
        np.testing.assert_array_equal(found, getattr(functional, name)(X, 0, **options).data)


def test_more_methods(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 4))
    t = Tensor(x)
    for found, expected in (
        (t.T, x.T),
        (t.transpose(), x.T),
        (t.transpose(1, 0, 2), x.transpose(1, 0, 2)),
        (t.transpose((1, 0, 2)), x.transpose(1, 0, 2)),
        (t.reshape(4, -1), x.reshape(4, -1)),
        (t.reshape((4, 6)), x.reshape(4, 6)),
        (t.reshape([24]), x.reshape(24)),
        (t.clip(-0.5, 0.5), x.clip(-0.5, 0.5)),
        (t.clip(high=0.5), np.minimum(x, 0.5)),
        (t.astype(np.float32), x.astype(np.float32)),
        (t.to("cpu"), x),
        (-t, -x),
        (t[0, ..., ::2], x[0, ..., ::2]),
    ):
        np.testing.assert_array_equal(found.data, expected)
        assert found.dtype == expected.dtype
    assert (t.shape, t.ndim, t.size, len(t)) == ((2, 3, 4), 3, 24, 2)
    for compared, expected in (
        (t < 0, x < 0),
        (t <= t, x <= x),
        (t > X[0], x > X[0]),
        (t >= 0, x >= 0),
    ):
        assert isinstance(compared, np.ndarray)
        np.testing.assert_array_equal(compared, expected)
