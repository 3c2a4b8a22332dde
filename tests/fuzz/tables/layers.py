"""Valid arguments of layers, first weights and random numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpidl import nn
from mpidl.nn import random
from tests.fuzz.calls import Given, given, on
from tests.fuzz.tables.engine import array, labels, t

IMAGES = (2, 2, 4, 4)


def state(model: nn.Module) -> dict[str, object]:
    return dict(model.state_dict())


TABLE: dict[str, Callable[[], Given]] = {
    "nn.activation:GELU": lambda: given("tanh"),
    "nn.activation:GELU.forward": lambda: on(nn.GELU(), t(2, 3)),
    "nn.activation:LeakyReLU": lambda: given(0.1),
    "nn.activation:LeakyReLU.forward": lambda: on(nn.LeakyReLU(), t(2, 3)),
    "nn.activation:ReLU.forward": lambda: on(nn.ReLU(), t(2, 3)),
    "nn.activation:Sigmoid.forward": lambda: on(nn.Sigmoid(), t(2, 3)),
    "nn.activation:Softmax": lambda: given(1),
    "nn.activation:Softmax.forward": lambda: on(nn.Softmax(), t(2, 3)),
    "nn.activation:Tanh.forward": lambda: on(nn.Tanh(), t(2, 3)),
    "nn.activation:Threshold": lambda: given(0.1, 0.2),
    "nn.activation:Threshold.forward": lambda: on(nn.Threshold(0.1, 0.2), t(2, 3)),
    "nn.attention:MultiHeadAttention": lambda: given(4, 2, dropout=0.1, bias=True, causal=False),
    "nn.attention:MultiHeadAttention.forward": lambda: on(
        nn.MultiHeadAttention(4, 2), t(1, 3, 4), np.ones((3, 3), bool), other=t(1, 3, 4)
    ),
    "nn.attention:TransformerBlock": lambda: given(
        4, 2, hidden=8, dropout=0.1, causal=False, activation=nn.ReLU
    )._replace(callbacks=("activation",)),
    "nn.attention:TransformerBlock.forward": lambda: on(
        nn.TransformerBlock(4, 2), t(1, 3, 4), np.ones((3, 3), bool)
    ),
    "nn.conv:AvgPool2d": lambda: given(2, 2, 0),
    "nn.conv:AvgPool2d.forward": lambda: on(nn.AvgPool2d(2), t(*IMAGES)),
    "nn.conv:Conv2d": lambda: given(2, 4, 2, stride=1, padding=1, dilation=1, groups=2, bias=True),
    "nn.conv:Conv2d.forward": lambda: on(nn.Conv2d(2, 4, 2), t(*IMAGES)),
    "nn.conv:MaxPool2d": lambda: given(2, 2, 0),
    "nn.conv:MaxPool2d.forward": lambda: on(nn.MaxPool2d(2), t(*IMAGES)),
    "nn.dropout:Dropout": lambda: given(0.1),
    "nn.dropout:Dropout.forward": lambda: on(nn.Dropout(), t(2, 3)),
    "nn.init:fans": lambda: given((2, 3)),
    "nn.init:he_normal": lambda: given(array(2, 3), "fan_out", 0.1),
    "nn.init:he_uniform": lambda: given(array(2, 3), "fan_out", 0.1),
    "nn.init:lecun_uniform": lambda: given(array(2, 3), 3),
    "nn.init:normal": lambda: given(array(2, 3), 0.1, 0.2),
    "nn.init:ones": lambda: given(array(2, 3)),
    "nn.init:orthogonal": lambda: given(array(2, 3), 0.5),
    "nn.init:uniform": lambda: given(array(2, 3), 0.1, 0.2),
    "nn.init:xavier_normal": lambda: given(array(2, 3), 0.5),
    "nn.init:xavier_uniform": lambda: given(array(2, 3), 0.5),
    "nn.init:zeros": lambda: given(array(2, 3)),
    "nn.linear:Embedding": lambda: given(3, 2),
    "nn.linear:Embedding.forward": lambda: on(nn.Embedding(3, 2), labels(3)),
    "nn.linear:Flatten.forward": lambda: on(nn.Flatten(), t(*IMAGES)),
    "nn.linear:Linear": lambda: given(3, 2, bias=True),
    "nn.linear:Linear.forward": lambda: on(nn.Linear(3, 2), t(2, 3)),
    "nn.linear:Sequential": lambda: given(nn.Linear(3, 2), nn.ReLU()),
    "nn.linear:Sequential.forward": lambda: on(nn.Sequential(nn.Linear(3, 2)), t(2, 3)),
    "nn.losses:accuracy": lambda: given(t(2, 3), labels(2)),
    "nn.losses:binary_accuracy": lambda: given(t(2, 1), labels(2)),
    "nn.module:Buffer": lambda: given(array(2, 3)),
    "nn.module:Module.__call__": lambda: on(nn.Linear(3, 2), t(2, 3)),
    "nn.module:Module.astype": lambda: on(nn.Linear(3, 2), np.float64),
    "nn.module:Module.load_state_dict": lambda: on(
        nn.Linear(3, 2), state(nn.Linear(3, 2)), strict=True
    ),
    "nn.module:Module.on_forward": lambda: on(nn.Linear(3, 2), print),
    "nn.module:Module.on_output": lambda: on(nn.Linear(3, 2), print),
    "nn.module:Module.predict": lambda: on(nn.Linear(3, 2), array(5, 3), batch_size=2),
    "nn.module:Module.summary": lambda: on(nn.Linear(3, 2), (1, 3)),
    "nn.module:Module.to": lambda: on(nn.Linear(3, 2), "cpu"),
    "nn.module:Module.train": lambda: on(nn.Linear(3, 2), False),
    "nn.module:Parameter": lambda: given(array(2, 3)),
    "nn.norm:BatchNorm1d": lambda: given(3, 1e-5, 0.1, sync=False),
    "nn.norm:BatchNorm1d.forward": lambda: on(nn.BatchNorm1d(3), t(2, 3)),
    "nn.norm:BatchNorm2d": lambda: given(3, 1e-5, 0.1, sync=False),
    "nn.norm:LayerNorm": lambda: given(3, 1e-5),
    "nn.norm:LayerNorm.forward": lambda: on(nn.LayerNorm(3), t(2, 3)),
    "nn.random:reseed": lambda: given(1, 2),
    "nn.random:seed": lambda: given(1),
    "nn.random:set_state": lambda: given(random.get_state()),
}
