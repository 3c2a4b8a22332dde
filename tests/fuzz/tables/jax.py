"""Valid arguments of mpidl.jax, and arrays of JAX that nobody expects: on one rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they take most of the time

import jax
import optax
from jax import numpy as jnp

import mpidl
import mpidl.jax
from tests.fuzz.calls import Given, given

mpidl.init(abort_on_error=False)

HOSTILE: dict[str, Callable[[], Any]] = {
    "jnp ()": lambda: jnp.ones(()),
    "jnp (0, 3)": lambda: jnp.ones((0, 3)),
    "jnp (2, 3)": lambda: jnp.ones((2, 3)),
    "jnp int": lambda: jnp.ones(3, int),
    "jnp int4": lambda: jnp.ones(3, jnp.int4),
    "jnp float8": lambda: jnp.ones(3, jnp.float8_e4m3fn),
    "jnp bfloat16": lambda: jnp.ones(3, jnp.bfloat16),
    "jnp complex": lambda: jnp.ones(3, jnp.complex64),
    "jnp bool": lambda: jnp.ones(3, bool),
    "jnp NaN": lambda: jnp.full(3, jnp.nan),
    "key": lambda: jax.random.key(1),
    "keys": lambda: jax.random.split(jax.random.key(1)),
    "deleted": lambda: deleted(jnp.ones(3)),
    "ShapeDtypeStruct": lambda: jax.ShapeDtypeStruct((2,), "f4"),
    "escaped tracer": lambda: escaped(),
    "jnp": lambda: jnp,
    "{1: jnp, 'a': jnp}": lambda: {1: jnp.ones(2), "a": jnp.ones(2)},
    "sgd": lambda: optax.sgd(0.1),
    "float0": lambda: jax.grad(lambda x: x.sum() * 1.0, allow_int=True)(jnp.ones(2, int)),
}


def deleted(array: Any) -> Any:
    array.delete()
    return array


def escaped() -> Any:
    """Return what stands for an argument of a function that was traced already."""
    found = []
    jax.make_jaxpr(lambda x: found.append(x))(jnp.ones(2))
    return found[0]


def tree() -> Any:
    return {"w": jnp.ones((2, 3)), "b": [jnp.ones(2)]}


def update(made: Any) -> None:
    """Update once outside a compiled function, and once inside."""
    params = tree()
    state = made.init(params)
    made.update(params, state, params)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # as mpidl's errors come out there
        jax.block_until_ready(jax.jit(made.update)(params, state, params))


TABLE: dict[str, Callable[[], Given]] = {
    "jax.average:average": lambda: given(tree(), weight=2.0),
    "jax.broadcast:broadcast": lambda: given(tree(), 0),
    "jax.optimizer:data_parallel": lambda: given(optax.sgd(0.1), weight=2.0)._replace(then=update),
}
