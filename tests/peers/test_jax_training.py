"""`mpidl.jax.data_parallel`: training with Optax."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they take most of the time
jax = pytest.importorskip("jax", reason="needs JAX: pip install 'mpidl[jax]'")
jnp = jax.numpy

from mpidl.jax import average, broadcast, data_parallel, optimizer  # noqa: E402

if TYPE_CHECKING:
    import mpidl

STEPS, BATCH = 20, 24


def network(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((network(params, x) - y) ** 2)


def start(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {"w1": (6, 16), "b1": (16,), "w2": (16, 3)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def batches(rng: np.random.Generator) -> list[tuple[Any, Any]]:
    return [
        (rng.standard_normal((BATCH, 6)).astype("f"), rng.standard_normal((BATCH, 3)).astype("f"))
        for _ in range(STEPS)
    ]


def train(tx: Any, params: Any, parts: list[tuple[Any, Any]], compiled: bool, **extra: Any) -> Any:
    optax = pytest.importorskip("optax", reason="needs Optax")

    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, x, y)
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    state = tx.init(params)
    for x, y in parts:
        params, state = step(params, state, x, y)
    return params


@pytest.mark.parametrize(
    ("compiled", "uneven"),
    [
        (True, True),
        *(pytest.param(*which, marks=pytest.mark.soak) for which in [(True, False), (False, True)]),
    ],
)
def test_equal_to_one_process(
    compiled: bool, uneven: bool, world: mpidl.World, rng: np.random.Generator,
    own: np.random.Generator,
) -> None:  # fmt: skip
    """20 steps of each rank on its part, from rank 0's start, are those on all of it."""
    optax = pytest.importorskip("optax", reason="needs Optax")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    whole, params = batches(rng), broadcast(start(own))
    borders = [BATCH * r // world.size for r in range(world.size + 1)]
    if uneven and world.size > 1:  # rank 0 has none in the first place: its weight is 0
        borders = [0, *(BATCH * r // (world.size - 1) for r in range(world.size))]
    part = slice(*borders[world.rank : world.rank + 2])
    samples = part.stop - part.start
    parts = [(x[part], y[part]) if samples else (x[:1], y[:1]) for x, y in whole]
    mine = train(
        data_parallel(tx, weight=1.0 if uneven else samples), params, parts, compiled,
        **{"weight": samples} if uneven else {},
    )  # fmt: skip
    alone = train(tx, params, whole, compiled)
    for name in params:
        np.testing.assert_allclose(mine[name], alone[name], rtol=1e-5, atol=1e-5)
        first = world.broadcast(np.asarray(mine[name]))
        np.testing.assert_array_equal(mine[name], first)  # the same bits on all ranks
        assert np.abs(mine[name] - params[name]).max() > 1e-2


def test_extra_arguments_and_chains(world: mpidl.World) -> None:
    optax = pytest.importorskip("optax", reason="needs Optax")
    seen = []

    def update(g: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        seen.append(value)
        return g, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = optax.chain(data_parallel(inner), optax.sgd(1.0))
    params = jnp.zeros(3)
    gradient = jnp.full(3, float(world.rank))
    updates, _ = tx.update(gradient, tx.init(params), params, value=5)
    np.testing.assert_allclose(updates, -(world.size - 1) / 2)
    assert seen == [5]


def test_without_optax(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    class Plain:
        """Anything with these two functions will do."""

        init = staticmethod(lambda _: 0)
        update = staticmethod(lambda g, state, _=None: (-0.5 * g, state + 1))

    monkeypatch.setattr(optimizer.importlib, "import_module", missing)
    init, update = data_parallel(Plain)
    updates, state = update(jnp.full(3, float(world.rank)), init(None))
    np.testing.assert_allclose(updates, -(world.size - 1) / 4)
    assert state == 1


def test_many_leaves_and_steps(world: mpidl.World, own: np.random.Generator) -> None:
    """As with async dispatch: the main thread averages too, while callbacks are on their way."""
    tree = [jnp.asarray(own.standard_normal(17), jnp.float32) for _ in range(20)]
    expected = [np.mean(world.gather(np.asarray(x)), axis=0) for x in tree]
    f = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, average(tree)))
    for _ in range(3):
        inside = f(tree)
        outside = average(tree)
        for i, o, e in zip(inside, outside, expected, strict=True):
            np.testing.assert_allclose(i, 2 * e, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(o, e, rtol=1e-4, atol=1e-5)
