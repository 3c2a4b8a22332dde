"""Valid arguments of tensors, functions and transforms."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpidl import functional, nn
from mpidl.autograd import Tensor, draw, tensor
from tests.fuzz.calls import Given, given, on

rng = np.random.default_rng(0)
FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def array(*shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def t(*shape: int) -> Tensor:
    return tensor(array(*shape), requires_grad=True)


def positive(*shape: int) -> Tensor:
    return tensor(np.abs(array(*shape)) + 1, requires_grad=True)


def labels(n: int) -> Any:
    return np.arange(n) % 3


def calling(function: Any, *args: Any, **options: Any) -> Given:
    return given(function, *args, **options)._replace(callbacks=(0,))


TABLE: dict[str, Callable[[], Given]] = {
    "autograd.check:check_gradients": lambda: given(
        functional.exp, array(2), step=1e-6, tolerance=1e-2
    )._replace(callbacks=(0,)),
    "autograd.picture:Picture.save": lambda: on(draw(t(2, 3) * 2), FOLDER / "graph.dot"),
    "autograd.picture:draw": lambda: given(t(2, 3) * 2, nn.Linear(3, 2), params={"w": t(2, 3)}),
    "autograd.tensor:Tensor": lambda: given(array(2, 3), requires_grad=True),
    "autograd.tensor:Tensor.argmax": lambda: on(t(2, 3), 1),
    "autograd.tensor:Tensor.astype": lambda: on(t(2, 3), np.float64),
    "autograd.tensor:Tensor.clip": lambda: on(t(2, 3), -1.0, high=1.0),
    "autograd.tensor:Tensor.flatten": lambda: on(t(2, 3), 1),
    "autograd.tensor:Tensor.max": lambda: on(t(2, 3), 1, keepdims=True),
    "autograd.tensor:Tensor.mean": lambda: on(t(2, 3), 1, keepdims=True),
    "autograd.tensor:Tensor.min": lambda: on(t(2, 3), 1, keepdims=True),
    "autograd.tensor:Tensor.reshape": lambda: on(t(2, 3), 3, 2),
    "autograd.tensor:Tensor.softmax": lambda: on(t(2, 3), 1),
    "autograd.tensor:Tensor.sum": lambda: on(t(2, 3), 1, keepdims=True),
    "autograd.tensor:Tensor.swapaxes": lambda: on(t(2, 3), 0, 1),
    "autograd.tensor:Tensor.to": lambda: on(t(2, 3), "cpu"),
    "autograd.tensor:Tensor.transpose": lambda: on(t(2, 3), 1, 0),
    "autograd.tensor:Tensor.var": lambda: on(t(2, 3), 1, correction=1, keepdims=True),
    "autograd.tensor:apply": lambda: given("maximum", t(2, 3), t(2, 3)),
    "autograd.tensor:tensor": lambda: given([[1.0, 2.0]], requires_grad=True, dtype=np.float32),
    "autograd.transforms:grad": lambda: given(functional.mean, 0)._replace(
        then=lambda f: f(array(2, 3)), callbacks=(0,)
    ),
    "autograd.transforms:jvp": lambda: given(functional.exp, array(2, 3), array(2, 3))._replace(
        callbacks=(0,)
    ),
    "autograd.transforms:vjp": lambda: given(functional.matmul, array(2, 3), array(3, 2))._replace(
        callbacks=(0,)
    ),
    "autograd.variable:Variable.backward": lambda: on(t(2, 3) * 2, array(2, 3)),
    "autograd.variable:Variable.on_gradient": lambda: on(t(2, 3), print),
    "functional:abs": lambda: given(t(2, 3)),
    "functional:attention": lambda: given(
        t(1, 2, 3),
        t(1, 4, 3),
        t(1, 4, 2),
        mask=np.ones((2, 4), bool),
        causal=True,
        scale=0.5,
        drop=np.ones((1, 2, 4), np.float32),
    ),
    "functional:avg_pool2d": lambda: given(t(1, 2, 4, 4), 2, stride=2, padding=0),
    "functional:batch_norm": lambda: given(
        t(2, 3),
        t(3),
        t(3),
        mean=np.zeros(3, np.float32),
        var=np.ones(3, np.float32),
        eps=1e-5,
        count=2.0,
        total=None,
    )._replace(callbacks=("total",)),
    "functional:binary_cross_entropy": lambda: given(
        t(2, 3), np.zeros((2, 3), np.float32), reduction="sum"
    ),
    "functional:broadcast_to": lambda: given(t(1, 3), (2, 3)),
    "functional:clip": lambda: given(t(2, 3), -1.0, 1.0),
    "functional:concatenate": lambda: given([t(2, 3), t(2, 3)], 1),
    "functional:conv2d": lambda: given(
        t(1, 2, 4, 4), t(4, 1, 2, 2), t(4), stride=1, padding=1, dilation=1, groups=2
    ),
    "functional:cos": lambda: given(t(2, 3)),
    "functional:cross_entropy": lambda: given(t(2, 3), labels(2), smoothing=0.1),
    "functional:dropout": lambda: given(t(2, 3), np.ones((2, 3), np.float32)),
    "functional:einsum": lambda: given("ij,jk->ik", t(2, 3), t(3, 2)),
    "functional:embedding": lambda: given(labels(4), t(3, 2)),
    "functional:exp": lambda: given(t(2, 3)),
    "functional:gelu": lambda: given(t(2, 3), "tanh"),
    "functional:kl": lambda: given(t(2, 3), np.full((2, 3), 1 / 3, np.float32)),
    "functional:l1": lambda: given(t(2, 3), array(2, 3), reduction="sum"),
    "functional:layer_norm": lambda: given(t(2, 3), t(3), t(3), eps=1e-5),
    "functional:leaky_relu": lambda: given(t(2, 3), 0.1),
    "functional:linear": lambda: given(t(2, 3), t(4, 3), t(4)),
    "functional:log": lambda: given(positive(2, 3)),
    "functional:log_softmax": lambda: given(t(2, 3), 1),
    "functional:matmul": lambda: given(t(2, 3), t(3, 2)),
    "functional:max": lambda: given(t(2, 3), 1, keepdims=True),
    "functional:max_pool2d": lambda: given(t(1, 2, 4, 4), 2, stride=2, padding=0),
    "functional:maximum": lambda: given(t(2, 3), t(2, 3)),
    "functional:mean": lambda: given(t(2, 3), 1, keepdims=True),
    "functional:min": lambda: given(t(2, 3), 1, keepdims=True),
    "functional:minimum": lambda: given(t(2, 3), t(2, 3)),
    "functional:mse": lambda: given(t(2, 3), array(2, 3), reduction="sum"),
    "functional:pad": lambda: given(t(2, 3), [(0, 1), (1, 0)], 1.0),
    "functional:relu": lambda: given(t(2, 3)),
    "functional:reshape": lambda: given(t(2, 3), (3, 2)),
    "functional:self_attention": lambda: given(
        t(1, 2, 12), 2, mask=np.ones((2, 2), bool), causal=True, drop=np.ones((1, 2, 2, 2), "f4")
    ),
    "functional:sigmoid": lambda: given(t(2, 3)),
    "functional:sin": lambda: given(t(2, 3)),
    "functional:softmax": lambda: given(t(2, 3), 1),
    "functional:sqrt": lambda: given(positive(2, 3)),
    "functional:stack": lambda: given([t(2, 3), t(2, 3)], 1),
    "functional:sum": lambda: given(t(2, 3), 1, keepdims=True),
    "functional:tanh": lambda: given(t(2, 3)),
    "functional:threshold": lambda: given(t(2, 3), 0.1, 0.2),
    "functional:transpose": lambda: given(t(2, 3), (1, 0)),
    "functional:var": lambda: given(t(2, 3), 1, correction=1, keepdims=True),
    "functional:where": lambda: given(np.ones((2, 3), bool), t(2, 3), t(2, 3)),
}
