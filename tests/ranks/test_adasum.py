"""Adasum: beside a plain NumPy reference of the same tree, and in training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.array import namespace, to_numpy
from mpidl.errors import InvalidArgument
from mpidl.strategies.adasum import DOT_ELEMENTS, Adasum
from tests.ranks.conftest import fewer_runs
from tests.ranks.test_parallel import make_model, weights_of

pytestmark = fewer_runs
LENGTHS = [0, 1, 2, 3, 7, 1023, 5 * DOT_ELEMENTS + 3]
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture
def strategy(world: mpidl.World) -> Iterator[Adasum]:
    made = Adasum(world)
    yield made
    made.close()


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The paper's formula, of two gradients of one layer in float64."""
    if not a.any() or not b.any():
        return a + b
    both = a @ b
    return (1 - both / (2 * (a @ a))) * a + (1 - both / (2 * (b @ b))) * b


def tree(grads: list[np.ndarray]) -> np.ndarray:
    """What the ranks' gradients of one layer become."""
    grads = [grad.astype(np.float64) for grad in grads]
    power = 2 ** int(np.log2(len(grads)))
    for low, beyond in enumerate(grads[power:]):
        grads[low] = pair(grads[low], beyond)
    grads = grads[:power]
    while len(grads) > 1:
        grads = [pair(a, b) for a, b in zip(grads[::2], grads[1::2], strict=True)]
    return grads[0]


def make_layout(rng: np.random.Generator, n: int) -> list[tuple[int, tuple[int, ...]]]:
    """Cut (n,) into layers of all lengths, with padding between some."""
    cuts = sorted({0, n, *rng.integers(0, n + 1, 6).tolist()})
    parts = pairwise(cuts)
    return [(start, (stop - start - int(stop - start > 3),)) for start, stop in parts]


def layers_of(layout: list[tuple[int, tuple[int, ...]]], n: int) -> list[slice]:
    return [slice(start, start + size) for start, (size,) in layout] or [slice(0, n)]


def similar(rng: np.random.Generator, own: np.random.Generator, n: int) -> np.ndarray:
    """A gradient that agrees with the others in part, and is longer or shorter."""
    grad: np.ndarray = own.uniform(0.1, 5) * (rng.standard_normal(n) + own.standard_normal(n))
    return grad


def reduced(strategy: Adasum, grad: Any, local: np.ndarray, weight: float) -> np.ndarray:
    """Reduce `local` in `grad`; in one piece, which covers it."""
    grad[:] = namespace(grad).asarray(local)
    pieces = list(strategy.reduce(grad, weight))
    assert [part for part, _ in pieces] == [strategy.owned(grad.size)] == [slice(0, grad.size)]
    assert pieces[0][1].dtype == grad.dtype
    return to_numpy(pieces[0][1]).copy()


def assert_close(found: np.ndarray, grads: list[np.ndarray], dtype: str) -> None:
    """Compare with the reference; a result may be much shorter than what went into it."""
    atol = 4 * TOLERANCES[dtype] * max(np.abs(grad).max(initial=0) for grad in grads)
    np.testing.assert_allclose(found, tree(grads), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_the_formula_on_a_tree(
    n: int,
    layered: bool,
    without: bool,
    dtype: str,
    strategy: Adasum,
    rng: np.random.Generator,
    own: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    """Whatever the weights are; and what a rank without samples holds counts as zero."""
    layout = make_layout(rng, n) if layered else []
    _, grad = strategy.allocate(n, np.dtype(dtype), xp, layout)
    for _ in range(2):  # the second finds what the first left behind
        weights = rng.uniform(0.1, 1, world.size)
        if without:
            weights[int(rng.integers(world.size))] *= world.size == 1
        weights /= weights.sum()
        inside = np.zeros(n, bool)
        for layer in layers_of(layout, n):
            inside[layer] = True
        local = np.where(inside, similar(rng, own, n), 0).astype(dtype)
        grads = world.gather(local * (weights[world.rank] > 0))
        if not weights[world.rank]:
            local[:] = np.nan
        found = reduced(strategy, grad, local, float(weights[world.rank]))
        for layer in layers_of(layout, n):
            assert_close(found[layer], [g[layer] for g in grads], dtype)
        assert not found[~inside].any()


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equal_gradients_give_that_gradient(
    dtype: str,
    scale: float,
    strategy: Adasum,
    rng: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    """Bit for bit; squares that float32 cannot hold do not matter."""
    local = (scale * rng.standard_normal(1001)).astype(dtype)
    _, grad = strategy.allocate(1001, np.dtype(dtype), xp)
    np.testing.assert_array_equal(reduced(strategy, grad, local, 1 / world.size), local)


def test_orthogonal_gradients_add_up_and_layers_are_apart(
    strategy: Adasum, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """In one array: a layer where all agree, between two where no two ranks share an element."""
    n = 500
    values = rng.standard_normal(3 * n)
    shared = np.arange(3 * n) // n == 1
    local = np.where(shared | (np.arange(3 * n) % world.size == world.rank), values, 0)
    layout = [(0, (n,)), (n, (n // 10, 10)), (2 * n, (n,))]
    _, grad = strategy.allocate(3 * n, np.dtype("float64"), xp, layout)
    np.testing.assert_array_equal(reduced(strategy, grad, local, 1 / world.size), values)


@pytest.mark.parametrize("n", [7, 100_003])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_same_bits_in_every_run_and_on_every_rank(
    dtype: str,
    n: int,
    strategy: Adasum,
    rng: np.random.Generator,
    own: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    layout, local = make_layout(rng, n), similar(rng, own, n).astype(dtype)
    outcomes = []
    for _ in range(3):
        _, grad = strategy.allocate(n, np.dtype(dtype), xp, layout)
        outcomes.append(reduced(strategy, grad, local, 1 / world.size).tobytes())
    assert len(set(outcomes)) == 1
    assert len(set(world.gather(outcomes[0]))) == 1


def test_arrays_of_all_sizes_and_dtypes_take_turns(
    strategy: Adasum,
    rng: np.random.Generator,
    own: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    """They share the memory that messages arrive in; each has its own layout."""
    made = []
    for n in (1000, 10, 3000):
        for dtype in TOLERANCES:
            layout = make_layout(rng, n)
            made.append((n, dtype, layout, strategy.allocate(n, np.dtype(dtype), xp, layout)[1]))
    for _ in range(2):
        for n, dtype, layout, grad in made:
            local = similar(rng, own, n).astype(dtype)
            grads = world.gather(local)
            found = reduced(strategy, grad, local, 1 / world.size)
            for layer in layers_of(layout, n):
                assert_close(found[layer], [g[layer] for g in grads], dtype)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_so_in_its_layer_and_step(
    value: float, strategy: Adasum, own: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    layout = [(0, (100,)), (112, (50,)), (176, (24,))]
    _, grad = strategy.allocate(208, np.dtype("float32"), xp, layout)
    local = np.zeros(208, np.float32)
    for start, shape in layout:
        local[start : start + shape[0]] = own.standard_normal(shape)
    bad = local.copy()
    bad[120] = value if world.rank == world.size - 1 else 1
    found = reduced(strategy, grad, bad, 1 / world.size)
    assert not np.isfinite(found[120])
    assert np.isfinite(np.delete(found, slice(112, 162))).all()
    assert np.isfinite(reduced(strategy, grad, local, 1 / world.size)).all()
    assert not found[100:112].any()  # padding, which no backward pass writes to


def test_tiny_beside_large(
    strategy: Adasum, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """The quotient of their norms passes what float32 holds."""
    large = rng.uniform(1, 2, 100).astype(np.float32)
    last = world.rank == world.size - 1
    local = np.full(100, 1e-42, np.float32) if last and world.rank else large
    _, grad = strategy.allocate(100, np.dtype("float32"), xp)
    found = reduced(strategy, grad, local, 1 / world.size)
    np.testing.assert_allclose(found, large, rtol=1e-5)


def test_a_zero_gradient_on_all_ranks(strategy: Adasum, world: mpidl.World, xp: Any) -> None:
    _, grad = strategy.allocate(33, np.dtype("float32"), xp)
    assert not reduced(strategy, grad, np.zeros(33, np.float32), 1 / world.size).any()


def test_only_gradients_it_allocated(strategy: Adasum, xp: Any) -> None:
    with pytest.raises(InvalidArgument, match="a gradient that it allocated"):
        list(strategy.reduce(xp.zeros(3), 1.0))


def test_arrays_that_are_gone_are_forgotten(strategy: Adasum, xp: Any) -> None:
    kept = strategy.allocate(5, np.dtype("float32"), xp)
    for _ in range(3):
        strategy.allocate(5, np.dtype("float32"), xp)
    assert list(strategy._layers) == [id(kept[1])]


def test_every_rank_owns_everything(
    strategy: Adasum, rng: np.random.Generator, own: np.random.Generator, xp: Any
) -> None:
    values = own.standard_normal(5)
    np.testing.assert_array_equal(strategy.total(values.tolist()), values)
    param, grad = strategy.allocate(9, np.dtype("float32"), xp)
    assert not to_numpy(param).any()
    assert not to_numpy(grad).any()
    new = rng.standard_normal(9).astype(np.float32)
    param[:] = xp.asarray(new)
    strategy.share(param)
    np.testing.assert_array_equal(to_numpy(param), new)


@pytest.mark.parametrize("bucket_bytes", [300, 1 << 20])
def test_training_equals_one_process_with_all_shards(
    bucket_bytes: int, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """Each parameter is a layer, whatever bucket it is in; a rank may have no sample."""
    model = make_model("float64", 5 + world.rank, xp)
    sgd = optim.SGD(lr=0.1, momentum=0.5)
    replica = mpidl.DataParallel(model, sgd, Adasum(world), bucket_bytes=bucket_bytes)
    alone = make_model("float64", 5)
    velocity = [np.zeros(p.shape) for p in alone.parameters()]
    for batch in (12, 7, 3, 8):
        x, y = rng.standard_normal((batch, 5)), rng.integers(0, 3, batch)
        shards = np.array_split(np.arange(batch), world.size)
        grads = []
        for shard in shards:
            part = copy.deepcopy(alone)
            if len(shard):
                nn.cross_entropy(part(x[shard]), y[shard]).backward()
            made = [np.zeros(p.shape) if p.grad is None else p.grad for p in part.parameters()]
            grads.append(made)
        for p, v, *shares in zip(alone.parameters(), velocity, *grads, strict=True):
            v *= 0.5
            v += tree([share.ravel() for share in shares]).reshape(p.shape)
            p.data -= 0.1 * v
        mine = shards[world.rank]
        if len(mine):
            nn.cross_entropy(model(xp.asarray(x[mine])), xp.asarray(y[mine])).backward()
        replica.step(weight=len(mine))
    np.testing.assert_allclose(weights_of(model), weights_of(alone), rtol=0, atol=1e-12)
    replica.close()


def test_training_lowers_the_loss_and_keeps_the_ranks_equal(
    rng: np.random.Generator, own: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    model = make_model("float32", world.rank, xp)
    rule = rng.standard_normal((5, 3))
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), Adasum(world))
    losses = []
    for _ in range(60):
        x = own.standard_normal((16, 5)).astype(np.float32)
        y = (x @ rule).argmax(1)
        loss = nn.cross_entropy(model(xp.asarray(x)), xp.asarray(y))
        loss.backward()
        losses.append(float(to_numpy(loss.data)))
        replica.step()
    means = world.sum(losses) / world.size
    assert means[-10:].mean() < 0.8 * means[:10].mean()
    assert len({weights.tobytes() for weights in world.gather(weights_of(model))}) == 1
    replica.close()
