"""`mpidl.tensorflow`: means in `tf.function` and outside."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, MpidlError, RankMismatch, UnsupportedDtype

if TYPE_CHECKING:
    import mpidl

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

import mpidl.tensorflow as hvd  # noqa: E402

HOW = {"eager": lambda f: f, "graph": tf.function}
ERRORS = (MpidlError, tf.errors.OpError)


@pytest.fixture(params=HOW)
def compiled(request: pytest.FixtureRequest) -> Any:
    return HOW[request.param]


def mean(world: mpidl.World, array: Any, weight: float = 1) -> np.ndarray[Any, Any]:
    """What is expected, in float64."""
    return np.average(
        world.gather(np.asarray(array, np.float64)), axis=0, weights=world.gather(float(weight))
    )


def draw(own: np.random.Generator, dtype: str, *shape: int) -> Any:
    return tf.cast(own.standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-6), ("float64", 1e-13), ("bfloat16", 2**-8), ("float16", 2**-10)],
)
def test_nested_tensors(
    dtype: str, tolerance: float, compiled: Any, world: mpidl.World, own: np.random.Generator
) -> None:
    tree = {
        "w": draw(own, dtype, 33, 5),
        "rest": [draw(own, "float32"), (draw(own, dtype, 0, 3), draw(own, "float64", 1001))],
        "none": None,
    }
    found = compiled(lambda: hvd.average(tree))()
    assert found["none"] is None
    for before, after in zip(tf.nest.flatten(tree), tf.nest.flatten(found), strict=True):
        if before is None:
            continue
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        rtol = max(tolerance, 1e-6 if before.dtype == "float32" else 0)
        wanted = mean(world, before.numpy())
        np.testing.assert_allclose(after.numpy().astype("f8"), wanted, rtol=rtol, atol=rtol)


def test_weights(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    weight = world.rank if world.size > 1 else 3
    values = draw(own, "float32", 10)
    mine = values * np.nan if weight == 0 else values
    average = compiled(lambda x, w: hvd.average(x, weight=w))
    expected = mean(world, values.numpy(), weight)
    for w in (weight, tf.constant(weight, "float32")):
        np.testing.assert_allclose(average(mine, w), expected, rtol=1e-5, atol=1e-6)


def test_order_of_equal_averages(world: mpidl.World, own: np.random.Generator) -> None:
    @tf.function
    def both(x: Any, y: Any) -> Any:
        first = hvd.average(x)
        second = hvd.average(y)
        total = tf.zeros(5)
        for _ in tf.range(3):
            total += hvd.average(x * 2)
        return first, second, total

    for _ in range(3):
        x, y = draw(own, "float32", 5), draw(own, "float32", 5)
        for found, wanted in zip(both(x, y), (x, y, 6 * x), strict=True):
            expected = mean(world, wanted.numpy())
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_derivative(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    """Of sum(c x mean(x)): the mean over ranks of c."""
    x, c = tf.Variable(draw(own, "float32", 5)), draw(own, "float32", 5)

    def derivative() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(c * hvd.average(x))
        return tape.gradient(loss, x)

    expected = mean(world, c.numpy())
    np.testing.assert_allclose(compiled(derivative)(), expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_become_dense(
    compiled: Any, world: mpidl.World, own: np.random.Generator
) -> None:
    table, scale = tf.Variable(draw(own, "float32", 4, 3)), draw(own, "float32", 3)
    rows = [world.rank % 4, 3]

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * scale)
        plain = tape.gradient  # the tape's own
        tape = hvd.DistributedGradientTape(tape)
        assert plain is not tape.gradient
        return tape.gradient(loss, [table])

    mine = np.zeros((4, 3))
    for row in rows:
        mine[row] += scale.numpy()
    (found,) = compiled(gradient)()
    assert isinstance(found, tf.Tensor)
    np.testing.assert_allclose(found, mean(world, mine), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [20])
def test_equal_to_one_process(
    steps: int, compiled: Any, world: mpidl.World, rng: np.random.Generator,
    own: np.random.Generator,
) -> None:  # fmt: skip
    """Of unequal parts, from rank 0's start; rank 0 has none of it if there are others."""
    batch = 12
    x, y = (rng.standard_normal((steps, batch, n)).astype("f") for n in (6, 3))
    mine = [tf.Variable(draw(own, "float32", *s)) for s in [(6, 16), (16, 3)]]
    hvd.broadcast_variables(mine)
    alone = [tf.Variable(v) for v in mine]
    part = slice(0, batch)
    if world.size > 1:
        edges = [0, 0, *(batch * r // (world.size - 1) for r in range(1, world.size))]
        part = slice(edges[world.rank], edges[world.rank + 1])

    def make(variables: list[Any], wrap: Any) -> Any:
        def step(x: Any, y: Any) -> None:
            with wrap(tf.GradientTape()) as tape:
                error = tf.tanh(x @ variables[0]) @ variables[1] - y
                loss = tf.reduce_mean(error**2)
            for variable, g in zip(variables, tape.gradient(loss, variables), strict=True):
                variable.assign_sub(0.1 * g)

        return compiled(step)

    samples = part.stop - part.start
    ours = make(mine, lambda tape: hvd.DistributedGradientTape(tape, weight=samples))
    single = make(alone, lambda tape: tape)
    for k in range(steps):
        own_part = slice(0, 1) if samples == 0 else part
        ours(x[k][own_part], y[k][own_part])
        single(x[k], y[k])
    for a, b in zip(mine, alone, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(a.numpy(), world.broadcast(a.numpy()))


def test_broadcast(compiled: Any, world: mpidl.World, own: np.random.Generator) -> None:
    root = world.size - 1
    values = [own.standard_normal((3, 2)), own.integers(0, 99, 4), own.integers(0, 2) > 0]
    variables = [tf.Variable(v) for v in [*values, draw(own, "bfloat16", 3)]]
    expected = world.broadcast([v.numpy() for v in variables], root)
    compiled(lambda: hvd.broadcast_variables(variables, root_rank=root))()
    for variable, wanted in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(variable.numpy(), wanted)
    with pytest.raises(ERRORS, match=f"root {world.size}"):
        compiled(lambda: hvd.broadcast_variables(variables, root_rank=world.size))()


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (np.zeros(3, np.int32), UnsupportedDtype, "tensor 1 has dtype int32"),
        (object(), InvalidArgument, "tensor 1 is a object"),
    ],
)
def test_what_cannot_be_averaged(
    bad: Any, error: type[Exception], said: str, compiled: Any, world: mpidl.World
) -> None:
    """One rank's mistake is raised on all; the next average works."""
    last = world.rank == world.size - 1
    second = bad if last else np.zeros(3, np.float32)
    # The rank that made it finds it when it traces, which wraps it, the others when they run.
    with pytest.raises(error if compiled is HOW["eager"] else Exception, match=said):
        compiled(lambda: hvd.average([tf.zeros(2), second]))()
    found = compiled(lambda: hvd.average(tf.fill([2], float(world.rank))))()
    np.testing.assert_allclose(found, (world.size - 1) / 2)


def test_tensors_that_differ(compiled: Any, world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    x = tf.zeros(3 + (world.rank == world.size - 1))
    told = r"tensor 0 \(4,\) float32, where rank 0 has tensor 0 \(3,\) float32"
    with pytest.raises(RankMismatch if compiled is HOW["eager"] else ERRORS, match=told):
        compiled(lambda: hvd.average([x]))()
    with pytest.raises(ERRORS, match="weight=-1"):
        compiled(lambda: hvd.average([tf.zeros(3)], weight=-1.0))()


def test_a_rank_without_tensors_keeps_none_waiting(compiled: Any, world: mpidl.World) -> None:
    assert compiled(lambda: hvd.average([None]))() == [None]
    if world.size > 1:
        mine = None if world.rank == world.size - 1 else tf.zeros(3)
        with pytest.raises(
            (RankMismatch, *ERRORS), match=r"no more, where rank 0 has .* \(3,\) float32"
        ):
            compiled(lambda: hvd.average([mine]))()


@pytest.mark.parametrize("weight", [-1.0, "a", [1.0, 2.0]])
def test_wrong_weights(weight: Any, compiled: Any, world: mpidl.World) -> None:
    mine = weight if world.rank == world.size - 1 else 1.0
    with pytest.raises(InvalidArgument if compiled is HOW["eager"] else Exception, match="weight"):
        compiled(lambda: hvd.average([tf.zeros(3)], weight=mine))()


def test_ranks(world: mpidl.World) -> None:
    assert (hvd.rank(), hvd.size()) == (world.rank, world.size)
    assert (hvd.local_rank(), hvd.local_size()) == (world.local_rank, world.local_size)
