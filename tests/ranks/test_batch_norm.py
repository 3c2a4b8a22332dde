"""`BatchNorm(sync=True)`: the statistics and the gradients of one process with the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.array import to_numpy
from tests.ranks.test_parallel import DEVICE_OF

if TYPE_CHECKING:
    from collections.abc import Callable

Rng = np.random.Generator
MODELS: dict[str, tuple[Callable[[bool], nn.Sequential], tuple[int, ...]]] = {
    "BatchNorm1d": (
        lambda sync: nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6, sync=sync), nn.Tanh(), nn.Linear(6, 3)
        ),
        (5,),
    ),
    "first layer": (  # whose input needs no gradient
        lambda sync: nn.Sequential(nn.BatchNorm1d(5, sync=sync), nn.Linear(5, 3)),
        (5,),
    ),
    "two of them": (
        lambda sync: nn.Sequential(
            nn.Linear(5, 6),
            nn.BatchNorm1d(6, eps=0.01, sync=sync),
            nn.Sigmoid(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4, momentum=0.3, sync=sync),
            nn.Linear(4, 3),
        ),
        (5,),
    ),
    "BatchNorm2d": (
        lambda sync: nn.Sequential(
            nn.Linear(4, 3),  # along the width
            nn.BatchNorm2d(2, sync=sync),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(30, 3),
        ),
        (2, 5, 4),
    ),
}


def split(n: int, kind: str, world: mpidl.World) -> list[int]:
    """Return where the shards of n samples begin and end, the same on every rank."""
    parts = {
        "even": [n // world.size] * world.size,
        "uneven": [i + 2 for i in range(world.size)],
        "some have none": [3 * (i == world.size // 2) for i in range(world.size)],
    }[kind]
    return [0, *np.cumsum(parts)]


@pytest.mark.parametrize("kind", ["even", "uneven", "some have none"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_one_process(
    name: str, kind: str, world: mpidl.World, rng: Rng, xp: Any
) -> None:
    make, shape = MODELS[name]
    ends = split(12, kind, world)
    nn.seed(int(rng.integers(1000)))
    alone, model = make(False).astype(np.float64), make(True).astype(np.float64)
    model.load_state_dict(alone.state_dict())
    model.to(DEVICE_OF[xp.__name__])
    assert any(m.sync for m in model.modules())
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1))
    for _ in range(4):
        x = rng.standard_normal((ends[-1], *shape)) * 3 + 5
        y = rng.integers(0, 3, ends[-1])
        for parameter in alone.parameters():
            parameter.zero_grad()
        nn.cross_entropy(alone(x), y).backward()
        for parameter in alone.parameters():
            parameter.data -= 0.1 * parameter.grad

        own = slice(ends[world.rank], ends[world.rank + 1])
        output = model(xp.asarray(x[own]))
        nn.cross_entropy(output, xp.asarray(y[own])).backward()
        replica.step()
    replica.close()
    expected = alone.state_dict()
    for key, value in model.state_dict().items():
        scale = max(1.0, np.abs(expected[key]).max())
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-12 * scale, err_msg=key)
    states = world.gather({k: v for k, v in model.state_dict().items() if "running" in k})
    for state in states:
        for key, value in state.items():
            np.testing.assert_array_equal(value, states[0][key])


def test_statistics_of_values_far_from_zero(world: mpidl.World, rng: Rng, xp: Any) -> None:
    """Also where ranks have different means: then most of the variance lies between them."""
    layer = nn.BatchNorm1d(3, momentum=1.0, sync=True).astype(np.float64)
    layer.to(DEVICE_OF[xp.__name__])
    x = [rng.standard_normal((rank + 2, 3)) + 1e6 + 10 * rank for rank in range(world.size)]
    layer(xp.asarray(x[world.rank]))
    whole = np.concatenate(x)
    deviation = whole - whole.mean(axis=0)
    var = (deviation**2).sum(axis=0) - deviation.sum(axis=0) ** 2 / len(whole)
    np.testing.assert_allclose(to_numpy(layer.running_mean.data), whole.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(to_numpy(layer.running_var.data), var / (len(whole) - 1), rtol=1e-10)


def test_evaluation_is_not_collective(world: mpidl.World, rng: Rng, xp: Any) -> None:
    """`predict` too: here one rank alone calls both; were it collective, it would wait for ever."""
    layer = nn.BatchNorm1d(3, sync=True).astype(np.float64)
    layer.running_mean.data[...] = rng.standard_normal(3)
    layer.to(DEVICE_OF[xp.__name__])
    x = rng.standard_normal((4, 3))
    if world.rank == world.size - 1:
        found = layer.eval()(xp.asarray(x))
        expected = (x - to_numpy(layer.running_mean.data)) / np.sqrt(1 + 1e-5)
        np.testing.assert_allclose(to_numpy(found.data), expected, rtol=1e-12)
        np.testing.assert_allclose(layer.train().predict(x), expected, rtol=1e-12)
    world.barrier()


def test_without_sync_each_rank_normalises_by_its_own_samples(
    world: mpidl.World, own: Rng, xp: Any
) -> None:
    layer = nn.BatchNorm1d(3).astype(np.float64).to(DEVICE_OF[xp.__name__])
    x = own.standard_normal((world.rank + 2, 3)) * 2 + world.rank
    y = to_numpy(layer(xp.asarray(x)).data)
    np.testing.assert_allclose(y, (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5), atol=1e-12)


def test_state_goes_to_the_device_and_back(world: mpidl.World, rng: Rng, xp: Any) -> None:
    layer = nn.BatchNorm1d(3).to(DEVICE_OF[xp.__name__])
    assert {type(t.data) for t in layer.named_state().values()} == {xp.ndarray}
    nn.init.uniform(layer.weight, 2.0, 3.0)
    state = layer.state_dict()
    assert {type(value) for value in state.values()} == {np.ndarray}
    assert ((state["weight"] >= 2) & (state["weight"] <= 3)).all()
    state["running_mean"] = rng.standard_normal(3).astype(np.float32)
    layer.load_state_dict(state)
    np.testing.assert_array_equal(to_numpy(layer.running_mean.data), state["running_mean"])
    expected = (1 - state["running_mean"]) / np.sqrt(1 + 1e-5) * state["weight"]
    found = layer.predict(np.ones((2, 3)), batch_size=1)
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-5)
