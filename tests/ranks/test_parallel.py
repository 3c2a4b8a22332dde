"""`DataParallel`: P ranks do what one process does with the same global batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import abort, data, nn, optim
from mpidl.array import Averages, to_numpy
from mpidl.autograd import Tensor, no_grad
from mpidl.errors import (
    AutogradError,
    InvalidArgument,
    MissingBackward,
    NonFiniteGradient,
    RankMismatch,
    UnsupportedDtype,
)
from mpidl.strategies import AllReduce
from tests.ranks.conftest import STRATEGIES

DEVICE_OF = {"numpy": "cpu", "cupy": "cuda"}
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


def make_model(dtype: str, seed: int, xp: Any = np) -> nn.Sequential:
    nn.seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model.to(DEVICE_OF[xp.__name__])


def weights_of(model: nn.Module) -> np.ndarray:
    return np.concatenate([to_numpy(p.data).ravel() for p in model.parameters()])


def make_data(rng: np.random.Generator, n: int, dtype: str) -> data.ArrayDataset:
    return data.ArrayDataset(rng.standard_normal((n, 5)).astype(dtype), rng.integers(0, 3, n))


def train_alone(model: nn.Sequential, train: data.ArrayDataset, batch: int, steps: int) -> None:
    """The reference: one process, no mpidl.DataParallel, the update written out."""
    velocity = [np.zeros_like(p.data) for p in model.parameters()]
    done = epoch = 0
    while done < steps:
        for x, y in data.batches(train, batch, world=None, seed=3, epoch=epoch):
            nn.cross_entropy(model(x), y).backward()
            for p, v in zip(model.parameters(), velocity, strict=True):
                v *= 0.9
                v += p.grad
                p.data -= 0.2 * v
                p.zero_grad()
            done += 1
            if done == steps:
                break
        epoch += 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("n", "batch"),
    [
        pytest.param(96, 24, id="even"),
        pytest.param(100, 13, id="uneven"),
        pytest.param(10, 3, id="ranks without a sample"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_20_steps_equal_one_process(
    strategy: str,
    n: int,
    batch: int,
    dtype: str,
    rng: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    train, seed = make_data(rng, n, dtype), int(rng.integers(1000))
    alone = make_model(dtype, seed)
    train_alone(alone, train, batch, 20)

    model = make_model(dtype, seed + world.rank, xp)  # rank 0's weights count
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.2, momentum=0.9), strategy)
    epoch = 0
    while replica.steps < 20:
        device = DEVICE_OF[xp.__name__]
        for x, y in data.batches(train, batch, world=world, seed=3, epoch=epoch, device=device):
            nn.cross_entropy(model(x), y).backward()
            replica.step()
            if replica.steps == 20:
                break
        epoch += 1
    replica.close()
    difference = np.abs(weights_of(model) - weights_of(alone)).max()
    assert difference <= TOLERANCES[dtype] * np.abs(weights_of(alone)).max()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_starts_and_stays_with_rank_0(
    strategy: str, own: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    model = make_model("float32", world.rank, xp)
    first = world.broadcast(weights_of(model))
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), strategy)
    np.testing.assert_array_equal(weights_of(model), first)
    for _ in range(3):
        x = xp.asarray(own.standard_normal((4, 5)).astype(np.float32))
        nn.mse(model(x), xp.zeros((4, 3), np.float32)).backward()
        replica.step()
    assert len(set(world.gather(weights_of(model).tobytes()))) == 1
    assert not np.array_equal(weights_of(model), first)
    replica.close()


def test_a_rank_of_weight_0_changes_nothing(world: mpidl.World) -> None:
    """Not even where its gradient is NaN, or where it never called backward."""
    if world.size == 1:
        pytest.skip("needs a rank that has samples and one that has none")
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0), "ring")
    before = weights_of(model)
    if world.rank == 0:
        model(np.full((1, 2), np.nan, np.float32)).sum().backward()
        replica.step(weight=0)
        replica.step(weight=0)
    else:
        for _ in range(2):
            model(np.ones((1, 2), np.float32)).sum().backward()
            replica.step()
    np.testing.assert_allclose(weights_of(model), before - 2, rtol=1e-6)
    replica.close()


class Scale(nn.Module):
    """The mean of the rows (n, 1) that lie somewhere in the inputs, times a weight."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(np.zeros(1))

    def forward(self, *inputs: Any, rows: Any = None) -> Tensor:
        first = rows if rows is not None else inputs[0]
        if not isinstance(first, (tuple, str)):
            return (self.weight * first).mean()
        return (self.weight * (inputs[1] if isinstance(first, str) else first[0])).mean()


@pytest.mark.parametrize("how", ["array", "tensor", "second"])
def test_samples_are_counted_in_training_only(how: str, world: mpidl.World) -> None:
    """Accumulated backwards weigh by all their samples; evaluation and errors do not count."""
    model = Scale()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0))
    rows = np.full((world.rank + 1, 1), float(world.rank))
    inputs = {"array": [rows], "tensor": [Tensor(rows)], "second": ["name", rows, np.ones(9)]}[how]
    for _ in range(2):
        model(*inputs).backward()
    with no_grad():
        model(np.ones((100, 1)))
    model.eval()
    model(np.ones((100, 1)))
    model.train()
    with pytest.raises(AutogradError):
        model(np.ones((100, 1)).astype(str))
    replica.step()
    weights = np.arange(world.size) + 1
    mean = (2 * np.arange(world.size) * weights).sum() / weights.sum()
    np.testing.assert_allclose(weights_of(model), -mean, rtol=1e-12, atol=1e-12)
    replica.close()
    model(*inputs)
    assert replica._count.rows is None


@pytest.mark.parametrize("how", ["nested", "keyword", "once", "not called"])
def test_samples_that_cannot_be_counted(how: str, world: mpidl.World) -> None:
    """A tuple of two is not two samples: what is not known is asked for."""
    model = Scale()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0))
    rows = np.full((world.rank + 1, 1), float(world.rank))
    known = world.rank < world.size - 1
    if known or how == "once":
        model(rows).backward()
    if not known:
        if how == "nested":
            model((rows, rows)).backward()
        elif how == "not called":
            model.forward(rows).backward()
        else:
            model(rows=rows).backward()
    why = "was not called" if how == "not called" else "was called without an array by position"
    said = rf"rank {world.size - 1}: step 0: .* could not be counted.*{why}: pass step\(weight="
    with pytest.raises(InvalidArgument, match=said):
        replica.step()
    replica.step(weight=1)
    total = sum(range(world.size)) + (world.size - 1) * (how == "once")
    np.testing.assert_allclose(weights_of(model), -total / world.size, rtol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step_without_backward(strategy: str, world: mpidl.World) -> None:
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), strategy)
    before = weights_of(model)
    lazy = world.rank == world.size - 1
    output = model(np.ones((2, 5))).sum()
    if not lazy:
        output.backward()
    with pytest.raises(MissingBackward, match=rf"rank {world.size - 1}: step 0: no gradient"):
        replica.step()
    np.testing.assert_array_equal(weights_of(model), before)
    if lazy:
        output.backward()
    replica.step()  # nothing was lost: the others' gradients are still there
    assert not np.array_equal(weights_of(model), before)
    replica.close()


def test_weights_are_checked(world: mpidl.World) -> None:
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1))
    model(np.ones((2, 5))).sum().backward()
    with pytest.raises(InvalidArgument, match="weight=-1"):
        replica.step(weight=-1 if world.rank == 0 else 1)
    with pytest.raises(MissingBackward, match="no rank has a sample"):
        replica.step(weight=0)
    replica.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_gradient_names_parameter_step_and_rank(
    bad: float, world: mpidl.World, xp: Any
) -> None:
    model = make_model("float32", 0, xp)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), "ring", check_finite=True)
    last = world.size - 1
    x, target = xp.ones((2, 5), np.float32), xp.zeros((2, 3), np.float32)
    nn.mse(model(x), target).backward()
    replica.step()
    before = weights_of(model)
    nn.mse(model(x), target).backward()
    if world.rank == last:
        model.layers[2].weight.grad[1, 1] = bad
    with pytest.raises(NonFiniteGradient, match=rf"rank {last}: step 1: .* 2\.weight"):
        replica.step()
    np.testing.assert_array_equal(weights_of(model), before)
    replica.close()


def different(world: mpidl.World, usual: Any, other: Any) -> Any:
    return other if world.rank == world.size - 1 else usual


@pytest.mark.parametrize("kind", ["shape", "dtype", "name", "more", "fewer"])
def test_models_that_differ(kind: str, world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    model = make_model("float32", 0)
    last = world.rank == world.size - 1
    if last and kind == "shape":
        model.layers[0].weight = nn.Parameter(np.zeros((8, 6), np.float32))
    if last and kind == "dtype":
        model.layers[0].weight = nn.Parameter(np.zeros((8, 5), np.float64))
    if last and kind == "name":
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    if last and kind == "more":
        model = nn.Sequential(*model.layers, nn.Linear(3, 3))
    if last and kind == "fewer":
        model = nn.Sequential(*model.layers[:2])
    said = {
        "shape": r"0\.weight of shape \(8, 6\), .* rank 0 has parameter 0\.weight of .*\(8, 5\)",
        "dtype": r"0\.weight .*float64.* rank 0 has parameter 0\.weight .*float32",
        "name": r"parameter 1\.weight .* where rank 0 has parameter 2\.weight",
        "more": r"parameter 3\.weight .* where rank 0 has no more",
        "fewer": r"no more, where rank 0 has parameter 2\.weight",
    }[kind]
    with pytest.raises(RankMismatch, match=rf"rank {world.size - 1}: .*{said}"):
        mpidl.DataParallel(model, optim.SGD(lr=0.1))


@pytest.mark.parametrize("dtype", [np.float16, ">f4"])  # ">": not this machine's byte order
def test_dtype_not_supported(dtype: Any, world: mpidl.World) -> None:
    model = make_model("float32", 0)
    if world.rank == world.size - 1:
        model.layers[2].bias = nn.Parameter(np.zeros(3, dtype))
    with pytest.raises(UnsupportedDtype, match=r"parameter 2\.bias .* float32, float64"):
        mpidl.DataParallel(model, optim.SGD(lr=0.1))


def test_model_without_parameters(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match="Sequential has no parameters"):
        mpidl.DataParallel(nn.Sequential(nn.ReLU()), optim.SGD(lr=0.1))


def test_weights_reach_the_strategy_as_python_floats(world: mpidl.World) -> None:
    """A NumPy float64 would make float32 gradients be scaled in float64, at half the speed."""
    seen = []

    class Spy:
        def __init__(self) -> None:
            self.inner = AllReduce(world)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def reduce(self, grad: Any, weight: float) -> Averages:
            seen.append(type(weight))
            return self.inner.reduce(grad, weight)

    model = make_model("float32", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), Spy())
    for weight in (None, np.float64(2)):
        model(np.ones((2, 5), np.float32)).sum().backward()
        replica.step(weight)
    assert seen == [float, float]


def test_bucket_bytes_must_be_the_same(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    bucket_bytes = 1 if world.rank == 1 else 2
    with pytest.raises(RankMismatch, match=r"bucket_bytes=1, .*, but rank 0 has bucket_bytes=2"):
        mpidl.DataParallel(make_model("float64", 0), optim.SGD(lr=0.1), bucket_bytes=bucket_bytes)


def test_a_trained_model_can_be_copied(world: mpidl.World) -> None:
    model = make_model("float64", 0)
    mpidl.DataParallel(model, optim.SGD(lr=0.1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(weights_of(twin), weights_of(model))
        twin.layers[0].weight.data[...] = 7
        assert not (model.layers[0].weight.data == 7).any()


def test_abort_on_error_stays_as_it_was_set(world: mpidl.World) -> None:
    assert abort._guard is not None
    mpidl.init(abort_on_error=False)
    mpidl.DataParallel(make_model("float64", 0), optim.SGD(lr=0.1))
    mpidl.average(np.zeros(1))
    wanted = abort._guard.wanted
    mpidl.init()
    assert not wanted
    assert abort._guard.wanted
