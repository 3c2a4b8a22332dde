"""`mpidl.jax`: averages of pytrees, inside compiled functions and outside."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, RankMismatch, UnsupportedDtype
from tests import job

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they take most of the time
jax = pytest.importorskip("jax", reason="needs JAX: pip install 'mpidl[jax]'")
jnp = jax.numpy

from mpidl.jax import average, broadcast  # noqa: E402

if TYPE_CHECKING:
    import mpidl

HOW = {"eager": lambda f: f, "jit": jax.jit}


@pytest.fixture(params=HOW)
def compiled(request: pytest.FixtureRequest) -> Any:
    return HOW[request.param]


def mean(world: mpidl.World, array: Any, weight: float = 1) -> np.ndarray[Any, Any]:
    """What is expected, in float64."""
    return np.average(
        world.gather(np.asarray(array, np.float64)), axis=0, weights=world.gather(float(weight))
    )


def draw(own: np.random.Generator, dtype: str, *shape: int) -> Any:
    return jnp.asarray(own.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-10)]
)
def test_nested_leaves(
    dtype: str, tolerance: float, compiled: Any, world: mpidl.World, own: np.random.Generator
) -> None:
    tree = {
        "w": draw(own, dtype, 33, 5),
        "rest": [draw(own, "float32"), (draw(own, dtype, 0, 3), draw(own, "float32", 1001))],
        "none": None,
    }
    found = compiled(average)(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        assert isinstance(after, jax.Array)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        np.testing.assert_allclose(
            np.asarray(after, np.float64), mean(world, before), rtol=tolerance, atol=tolerance
        )


def test_half_types_are_rounded_once(
    compiled: Any, world: mpidl.World, own: np.random.Generator
) -> None:
    """A sum of them would overflow, or lose what is small beside the others."""
    big = jnp.full(3, 60000.0, jnp.float16)
    np.testing.assert_array_equal(compiled(average)(big), big)
    mine = jnp.asarray([256.0 if world.rank == 0 else 1.0], jnp.bfloat16)
    expected = np.asarray([(256 + world.size - 1) / world.size], np.float32)
    found = compiled(average)(mine)
    np.testing.assert_array_equal(np.asarray(found), expected.astype(found.dtype))


def test_float64(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    with jax.enable_x64(True):
        tree = (draw(own, "float64", 17), draw(own, "float32", 5))
        found = compiled(average)(tree)
        assert [x.dtype for x in found] == ["float64", "float32"]
        np.testing.assert_allclose(found[0], mean(world, tree[0]), rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(found[1], mean(world, tree[1]), rtol=1e-6, atol=1e-6)


def test_more_than_one_chunk(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    tree = [draw(own, "float32", 700_001), draw(own, "float32", 600, 1001)]
    for before, after in zip(tree, compiled(average)(tree), strict=True):
        np.testing.assert_allclose(after, mean(world, before), rtol=1e-5, atol=1e-6)


def test_weights(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    """Also of 0, beside which a NaN does not count; given as numbers or as arrays."""
    weight = world.rank if world.size > 1 else 3
    values = draw(own, "float32", 10)
    mine = values.at[3].set(np.nan) if weight == 0 else values
    expected = mean(world, values, weight)
    by_number = compiled(lambda x: average(x, weight=weight))(mine)
    by_array = compiled(lambda x, w: average(x, weight=w))(mine, jnp.float32(weight))
    np.testing.assert_allclose(by_number, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_array, expected, rtol=1e-5, atol=1e-6)


def test_numbers_and_numpy_arrays(world: mpidl.World) -> None:
    held = np.full(3, world.rank, np.float32)
    found = average({"loss": float(world.rank), "array": held})
    expected = (world.size - 1) / 2
    assert float(found["loss"]) == pytest.approx(expected)
    np.testing.assert_allclose(found["array"], expected)
    np.testing.assert_array_equal(held, world.rank)  # as it was
    assert average([]) == []
    assert jax.jit(lambda w: average([], weight=w))(1.0) == []


def test_results_outside_are_not_copied_and_may_be_donated(
    world: mpidl.World, own: np.random.Generator
) -> None:
    """They lie side by side in one piece of memory."""
    tree = [draw(own, "float32", 1000), draw(own, "float32", 1000)]
    first, second = average(tree)
    assert second.unsafe_buffer_pointer() - first.unsafe_buffer_pointer() == 4032  # cache lines
    expected = mean(world, tree[1])
    overwrite = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    np.testing.assert_array_equal(overwrite(first), -7)
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=1e-6)


def test_devices_are_kept(world: mpidl.World) -> None:
    device = jax.devices()[0]
    free, pinned = jnp.ones(3), jax.device_put(np.ones(3, np.float32), device)
    found = average([free, pinned])
    assert [x.committed for x in found] == [False, True]
    assert found[1].sharding == pinned.sharding


def test_order_within_and_between_programs(world: mpidl.World, own: np.random.Generator) -> None:
    """Averages of equal layout, which could be taken for each other; some in a loop."""

    @jax.jit
    def twice(x: Any, y: Any) -> Any:
        return average(x), average(y)

    @jax.jit
    def loop(x: Any) -> Any:
        def body(total: Any, row: Any) -> Any:
            return total + average(row), average(row * 2)

        return jax.lax.scan(body, jnp.zeros(5), x)

    for _ in range(2):
        x, y, rows = draw(own, "float32", 5), draw(own, "float32", 5), draw(own, "float32", 7, 5)
        first = twice(x, y)
        second = twice(y, x)
        third = loop(rows)
        outside = average(y * 3)  # while the others may be on their way
        total, each = third
        for found, wanted in [
            (first[0], x), (first[1], y), (second[0], y), (second[1], x),
            (outside, 3 * y), (total, rows.sum(0)), (each, 2 * rows),
        ]:  # fmt: skip
            np.testing.assert_allclose(found, mean(world, wanted), rtol=1e-4, atol=1e-5)


def test_in_one_branch(world: mpidl.World, own: np.random.Generator) -> None:
    x = draw(own, "float32", 5)
    f = jax.jit(lambda on, x: jax.lax.cond(on, average, lambda x: x, x))
    np.testing.assert_array_equal(f(False, x), x)
    np.testing.assert_allclose(f(True, x), mean(world, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (np.zeros(3, np.int32), UnsupportedDtype, r"tree\['b'\] has dtype int32"),
        ("text", InvalidArgument, r"tree\['b'\] is a str"),
        (np.array(["text"]), InvalidArgument, r"tree\['b'\] has dtype <U4"),
    ],
)
def test_what_cannot_be_averaged(
    bad: Any, error: type[Exception], said: str, world: mpidl.World
) -> None:
    """One rank's mistake is raised on all, inside and outside; the next average works."""
    last = world.rank == world.size - 1
    second = bad if last else np.zeros(3, np.float32)
    with pytest.raises(error, match=said):
        average({"a": jnp.zeros(2), "b": second})
    # The rank that made it finds it when it traces, the others when they run.
    with pytest.raises(error if last else jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(jax.jit(lambda a: average({"a": a, "b": second}))(jnp.zeros(2)))
    np.testing.assert_allclose(
        jax.jit(average)(jnp.float32(world.rank)), (world.size - 1) / 2, rtol=1e-6
    )


def test_trees_that_differ(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    last = world.rank == world.size - 1
    tree = {"a": jnp.zeros(2), "b" if last else "c": jnp.zeros(4 if last else 3)}
    told = r"tree\['b'\] \(4,\) float32, where rank 0 has tree\['c'\] \(3,\) float32"
    with pytest.raises(RankMismatch, match=told):
        average(tree)
    with pytest.raises(jax.errors.JaxRuntimeError, match=told):
        jax.block_until_ready(jax.jit(average)(tree))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1 or 2"])
def test_wrong_weights(weight: Any, world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match="weight"):
        average(jnp.zeros(3), weight=weight if world.rank == 0 else 1)
    with pytest.raises((InvalidArgument, jax.errors.JaxRuntimeError), match="weight"):
        jax.block_until_ready(
            jax.jit(lambda x: average(x, weight=weight if world.rank == 0 else 1))(jnp.zeros(3))
        )
    with pytest.raises(InvalidArgument, match="weights of all ranks are 0"):
        average(jnp.zeros(3), weight=0)


@pytest.mark.parametrize("how", [jax.vmap, jax.grad, lambda f: jax.jit(jax.grad(f))])
def test_what_it_does_not_do_is_told(how: Any, world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match=r"average the gradients"):
        how(lambda x: average(x).sum())(jnp.ones(3))


def test_broadcast(world: mpidl.World, own: np.random.Generator) -> None:
    root = world.size - 1
    tree = {
        "w": draw(own, "float32", 3, 5),
        "step": jnp.int32(world.rank + 7),
        "key": jax.random.key(world.rank),
        "half": draw(own, "bfloat16", 3),
        "flag": np.array(world.rank == root),
        "empty": jnp.zeros((0, 2)),
    }
    found = broadcast(tree, root)
    raw = {**tree, "key": jax.random.key_data(tree["key"])}
    expected = world.gather(jax.tree.map(np.asarray, raw))[root]
    for name, value in expected.items():
        mine = found[name]
        assert isinstance(mine, jax.Array) and mine.dtype == tree[name].dtype
        mine = jax.random.key_data(mine) if name == "key" else mine
        np.testing.assert_array_equal(np.asarray(mine), value)
    jax.random.normal(found["key"])  # it is a key still


ONE_CORE = """
import os
os.environ.pop("NPROC", None)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import mpidl.jax
import jax

average = jax.jit(mpidl.jax.average)
x = jax.numpy.ones((1024, 1024))
for _ in range(5):
    x = average(x @ x / 1024)  # which the pool is busy with when the average is called
assert float(x[0, 0]) == 1
"""


def test_ranks_that_have_one_core_each(world: mpidl.World) -> None:
    """Where one waits for its own callback, so does a process alone."""
    if world.rank == 0:
        result = job.execute(None, sys.executable, "-c", ONE_CORE, timeout=60)
        assert result.status == 0, result


def test_what_cannot_be_broadcast(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match="root"):
        broadcast(jnp.ones(3), root=world.size)
    with pytest.raises(InvalidArgument, match="tree has dtype object"):
        broadcast(np.array([print]))
    with pytest.raises(InvalidArgument, match="inside a compiled function"):
        jax.jit(broadcast)(jnp.ones(3))
    if world.size > 1:
        with pytest.raises(RankMismatch, match="root 1, where rank 0 has root 0"):
            broadcast(jnp.ones(3), root=int(world.rank == 1))
        with pytest.raises(RankMismatch, match=r"tree \(4,\).*, where rank 0 has tree \(3,\)"):
            broadcast(jnp.ones(3 + (world.rank == world.size - 1)))
