"""Every optimizer, with options worth testing, and what it should do: its formula, in float64.

A reference takes whole parameters, a list of arrays, and yields them after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mpidl import optim

Arrays = Sequence[np.ndarray]
Reference = Callable[..., Iterator[list[np.ndarray]]]


def each(step: Callable[..., tuple[np.ndarray, dict]]) -> Reference:
    """Make a reference of a function (p, g, state, t, **options) -> p, its state empty at first."""

    def run(params: Arrays, grads: Sequence[Arrays], **options: Any) -> Iterator[list[np.ndarray]]:
        params, states = [p.astype(np.float64) for p in params], [{} for _ in params]
        for t, gs in enumerate(grads):
            params = [
                step(p, g.astype(np.float64), state, t, **options)
                for p, g, state in zip(params, gs, states, strict=True)
            ]
            yield params

    return run


def decay_mean(state: dict, name: str, beta: float, value: np.ndarray) -> np.ndarray:
    state[name] = beta * state.get(name, 0) + (1 - beta) * value
    return state[name]


def sgd(p, g, state, _, lr, momentum=0.0, weight_decay=0.0, nesterov=False):
    g = g + weight_decay * p
    state["v"] = v = momentum * state.get("v", 0) + g
    return p - lr * (g + momentum * v if nesterov else v)


def adam_direction(g, state, t, betas, eps):
    m = decay_mean(state, "m", betas[0], g) / (1 - betas[0] ** (t + 1))
    v = decay_mean(state, "v", betas[1], g**2) / (1 - betas[1] ** (t + 1))
    return m / (np.sqrt(v) + eps)


def adam(p, g, state, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    return p - lr * adam_direction(g + weight_decay * p, state, t, betas, eps)


def adamw(p, g, state, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    return p - lr * (adam_direction(g, state, t, betas, eps) + weight_decay * p)


def rmsprop(
    p, g, state, _, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False
):
    g = g + weight_decay * p
    square = decay_mean(state, "s", alpha, g**2)
    if centered:
        square = square - decay_mean(state, "a", alpha, g) ** 2
    state["b"] = momentum * state.get("b", 0) + g / (np.sqrt(square) + eps)
    return p - lr * state["b"]


def adagrad(p, g, state, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial=0.0, eps=1e-10):
    g = g + weight_decay * p
    state["s"] = state.get("s", initial) + g**2
    return p - lr / (1 + t * lr_decay) * g / (np.sqrt(state["s"]) + eps)


def norm(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).sum()))


def lars(p, g, state, _, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
    denominator = norm(g) + weight_decay * norm(p)
    local = trust * norm(p) / denominator if norm(p) > 0 and denominator > 0 else 1
    state["v"] = momentum * state.get("v", 0) + lr * local * (g + weight_decay * p)
    return p - state["v"]


def lamb(p, g, state, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-2):
    u = adam_direction(g, state, t, betas, eps) + weight_decay * p
    return p - lr * (norm(p) / norm(u) if norm(p) > 0 and norm(u) > 0 else 1) * u


REFERENCES: dict[type, Reference] = {
    optim.SGD: each(sgd),
    optim.Adam: each(adam),
    optim.AdamW: each(adamw),
    optim.RMSprop: each(rmsprop),
    optim.Adagrad: each(adagrad),
    optim.LARS: each(lars),
    optim.LAMB: each(lamb),
}

CASES: list[tuple[type, dict[str, Any]]] = [
    *(
        (optim.SGD, {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay})
        for momentum in (0.0, 0.9)
        for nesterov in (False, True)
        for decay in (0.0, 0.01)
        if momentum or not nesterov
    ),
    (optim.Adam, {}),
    (optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (optim.Adam, {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-2}),
    (optim.AdamW, {}),
    (optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
    *(
        (optim.RMSprop, {"lr": 0.01, "momentum": momentum, "centered": centered})
        for momentum in (0.0, 0.9)
        for centered in (False, True)
    ),
    (optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.5}),
    (optim.Adagrad, {}),
    (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial": 0.5, "eps": 1e-3}),
    (optim.LARS, {"lr": 1.0}),
    (optim.LARS, {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.1, "trust": 0.1}),
    (optim.LAMB, {}),
    (optim.LAMB, {"weight_decay": 0.0}),
    (optim.LAMB, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
]
IDS = [f"{kind.__name__}{options or ''}" for kind, options in CASES]
