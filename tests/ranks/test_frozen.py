"""Which parameters train: not the frozen, nor those out of their bucket. And `zero_grad`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.array import to_numpy
from mpidl.autograd import Tensor
from mpidl.errors import InvalidArgument, MissingBackward, NonFiniteGradient, RankMismatch
from tests.ranks.conftest import STRATEGIES
from tests.ranks.test_parallel import Scale, make_data, make_model, weights_of


def freeze(*parameters: nn.Parameter, value: bool = True) -> None:
    for parameter in parameters:
        parameter.requires_grad = not value


def state(model: nn.Module) -> list[np.ndarray]:
    return [np.array(to_numpy(p.data)) for p in model.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_start_as_those_of_rank_0_and_stay(
    strategy: str, accumulate: int, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """The others train as those of one process do; weight decay would move the frozen."""
    model, alone = make_model("float64", world.rank, xp), make_model("float64", 0)
    frozen = model.layers[0]
    frozen.bias.data[...] = world.rank
    alone.layers[0].bias.data[...] = 0
    freeze(frozen.weight, frozen.bias)
    memory = frozen.weight.data
    sgd = optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    replica = mpidl.DataParallel(model, sgd, strategy, accumulate=accumulate)
    assert list(replica.parameters) == ["2.weight", "2.bias"]
    held = [name for b in replica.buckets for name in b.places]
    assert sorted(held) == ["2.bias", "2.weight"]
    velocity = [np.zeros(p.shape) for p in alone.layers[2].parameters()]
    for _ in range(3):
        x, target = rng.standard_normal((6, 5)), rng.standard_normal((6, 3))
        nn.mse(alone(x), target).backward()
        for p, v in zip(alone.layers[2].parameters(), velocity, strict=True):
            v *= 0.9
            v += p.grad + 0.1 * p.data
            p.data -= 0.1 * v
        alone.zero_grad()
        for part in np.array_split(np.arange(6), accumulate):
            mine = np.array_split(part, world.size)[world.rank]
            if len(mine):
                nn.mse(model(xp.asarray(x[mine])), xp.asarray(target[mine])).backward()
            replica.step(weight=len(mine))
    assert frozen.weight.data is memory
    assert frozen.weight.grad is None
    for found, expected in zip(state(model), state(alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(to_numpy(memory), alone.layers[0].weight.data)
    replica.close()


def test_frozen_parameters_may_be_of_any_dtype(world: mpidl.World) -> None:
    model = make_model("float32", 0)
    half = nn.Parameter(np.full(3, world.rank, np.float16))
    freeze(half)
    model.table = half  # type: ignore[attr-defined]
    mpidl.DataParallel(model, optim.SGD(lr=0.1))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half.data, np.zeros(3))


def test_ranks_that_froze_different_parameters(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    model = make_model("float32", 0)
    if world.rank == world.size - 1:
        freeze(model.layers[0].bias)
    said = rf"rank {world.size - 1}: frozen parameter 0\.bias .* rank 0 has parameter 0\.bias"
    with pytest.raises(RankMismatch, match=said):
        mpidl.DataParallel(model, optim.SGD(lr=0.1))


def test_all_parameters_are_frozen(world: mpidl.World) -> None:
    model = make_model("float32", 0)
    if world.rank == world.size - 1:
        freeze(*model.parameters())
    with pytest.raises(InvalidArgument, match="Sequential has no parameters to train: all are fr"):
        mpidl.DataParallel(model, optim.SGD(lr=0.1))


def test_patterns_need_not_match_the_frozen_but_may(world: mpidl.World) -> None:
    """A pattern for layers that are to be unfrozen later is no mistake; one for nothing is."""
    sgd = optim.SGD(lr=1.0)
    for patterns in ({"2.*": sgd}, {"0.*": optim.Adam(), "2.*": sgd}):
        model = make_model("float64", 0)
        freeze(*model.layers[0].parameters())
        before = state(model)
        replica = mpidl.DataParallel(model, patterns)
        model(np.ones((2, 5))).sum().backward()
        replica.step()
        moved = [not np.array_equal(a, b) for a, b in zip(before, state(model), strict=True)]
        assert moved == [False, False, True, True]
        np.testing.assert_allclose(before[3] - state(model)[3], 2, rtol=1e-12)  # by SGD
    with pytest.raises(InvalidArgument, match=r"optimizer pattern '9\.\*' gets no parameter"):
        mpidl.DataParallel(model, {"9.*": sgd, "2.*": sgd})
    with pytest.raises(InvalidArgument, match=r"no optimizer for parameter 2\."):
        mpidl.DataParallel(model, {"0.*": sgd})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("late", ["frozen", "unfrozen"])
def test_what_is_frozen_may_not_change(late: str, accumulate: int, world: mpidl.World) -> None:
    """Momentum and weight decay would move it, or nothing would; then all goes on as before."""
    model = make_model("float64", 0)
    changed, last = model.layers[0].bias, world.rank == world.size - 1
    freeze(changed, value=late == "unfrozen")
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), accumulate=accumulate)
    before = state(model)
    if last:
        freeze(changed, value=late == "frozen")
    what = "after DataParallel was made" if late == "frozen" else "when DataParallel was made"
    said = rf"rank {world.size - 1}: step 0: parameter 0\.bias was frozen {what}.*requires_grad to"
    for k in range(accumulate):
        model(np.ones((2, 5))).sum().backward()
        if k < accumulate - 1:
            replica.step()
    with pytest.raises(InvalidArgument, match=said):
        replica.step()
    for a, b in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(a, b)
    freeze(changed, value=late == "unfrozen")
    for _ in range(accumulate):
        replica.zero_grad()
        model(np.ones((2, 5))).sum().backward()
        replica.step()
    assert replica.steps == 1
    assert len(set(world.gather(weights_of(model).tobytes()))) == 1
    replica.close()


def test_flush_does_not_move_what_was_frozen_since(world: mpidl.World) -> None:
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), accumulate=2)
    model(np.ones((2, 5))).sum().backward()
    replica.step()
    freeze(model.layers[2].weight)
    with pytest.raises(InvalidArgument, match=r"parameter 2\.weight was frozen after"):
        replica.flush()


def test_frozen_for_one_pass_and_trained_in_the_next(world: mpidl.World, xp: Any) -> None:
    """As the critic of a generator is: its gradients still gather in the buckets."""
    model, usual = make_model("float64", 0, xp), make_model("float64", 0, xp)
    pairs = [(m, mpidl.DataParallel(m, optim.SGD(lr=0.1, momentum=0.9))) for m in (model, usual)]
    for _ in range(2):
        for m, replica in pairs:
            if m is model:
                x = Tensor(xp.ones((9, 5)), requires_grad=True)
                freeze(*m.parameters())
                m(x).sum().backward()
                assert x.grad is not None
                freeze(*m.parameters(), value=False)
                replica.zero_grad()
            m(xp.full((world.rank + 1, 5), world.rank + 1.0)).sum().backward()
            replica.step()
    np.testing.assert_array_equal(weights_of(model), weights_of(usual))
    for p in model.parameters():
        assert any(xp.shares_memory(p.data, b.param) for b in pairs[0][1].buckets)


def test_a_trainer_with_frozen_layers(rng: np.random.Generator, world: mpidl.World) -> None:
    model = make_model("float64", 0)
    freeze(*model.layers[0].parameters())
    before = state(model)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optim.AdamW(), quiet=True)
    train = make_data(rng, 20, "float64")
    first, *_, last = trainer.fit(train, 20, 5, evaluate=train)
    moved = [not np.array_equal(a, b) for a, b in zip(before, state(model), strict=True)]
    assert moved == [False, False, True, True]
    assert last.loss < first.loss


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_gradients_are_born_in_the_buckets(bucket_bytes: int, world: mpidl.World, xp: Any) -> None:
    """No packing: every parameter and gradient is, and stays, a view into a bucket."""
    model = make_model("float32", 0, xp)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), bucket_bytes=bucket_bytes)
    assert len(replica.buckets) == {1: 4, 100: 2, 1 << 20: 1}[bucket_bytes]
    for _ in range(2):
        nn.mse(model(xp.ones((2, 5), np.float32)), xp.zeros((2, 3), np.float32)).backward()
        for p in model.parameters():
            assert any(xp.shares_memory(p.data, b.param) for b in replica.buckets)
            assert any(xp.shares_memory(p.grad, b.grad) for b in replica.buckets)
        replica.step()
    replica.close()


def test_two_dtypes_in_one_model(world: mpidl.World, rng: np.random.Generator) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            self.a = nn.Parameter(np.ones(3, np.float32))
            self.b = nn.Parameter(np.ones(3, np.float64))

        def forward(self, x: Any) -> Tensor:
            return (self.a * x).sum() + (self.b * x).sum()

    model = Mixed()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0), "ring")
    model(np.float32([1, 2, 3]) * world.rank).backward()
    replica.step(weight=1)
    mean = (world.size - 1) / 2
    for p in model.parameters():
        np.testing.assert_allclose(p.data, 1 - np.array([1, 2, 3]) * mean, rtol=1e-6)
    replica.close()


def test_a_parameter_without_a_part_in_the_loss_counts_as_zero(world: mpidl.World) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            self.always = nn.Parameter(np.zeros(2))
            self.sometimes = nn.Parameter(np.zeros(2))

        def forward(self, x: Any) -> Tensor:
            total = (self.always * x).sum()
            return total + (self.sometimes * x).sum() if world.rank == 0 else total

    model = Sometimes()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0))
    for _ in range(2):  # the second time, stale memory must not count
        model(np.ones(2)).backward()
        replica.step(weight=1)
    np.testing.assert_allclose(model.always.data, -2, rtol=1e-12)
    np.testing.assert_allclose(model.sometimes.data, -2 / world.size, rtol=1e-12)
    replica.close()


@pytest.mark.parametrize("weight", [1, 0])
@pytest.mark.parametrize("how", ["replaced", "another DataParallel", "gradient"])
def test_a_parameter_that_left_its_bucket(how: str, weight: float, world: mpidl.World) -> None:
    """Training would go on in memory that the model no longer uses."""
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1))
    last = world.rank == world.size - 1
    if how == "replaced" and last:
        model.layers[2].bias.data = np.zeros(3)
    if how == "gradient" and last:
        model.layers[2].bias.drop_grad()
    if how == "another DataParallel":
        mpidl.DataParallel(model, optim.SGD(lr=0.1))
    model(np.ones((2, 5))).sum().backward()
    with pytest.raises(InvalidArgument, match=r"parameter \d\.\w+ has left its bucket"):
        replica.step(weight=weight)


def test_zero_grad_forgets_gradients_and_samples(world: mpidl.World) -> None:
    """A pass that was another model's leaves no trace, neither counted nor uncounted."""
    model = Scale()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0))
    model(np.full((5 * world.rank + 1, 1), 7.0)).backward()
    model(rows=np.ones((3, 1))).backward()
    replica.zero_grad()
    assert model.weight.grad is None
    model(np.full((world.rank + 1, 1), float(world.rank))).backward()
    replica.step()
    weights = np.arange(world.size) + 1
    mean = (np.arange(world.size) * weights).sum() / weights.sum()
    np.testing.assert_allclose(weights_of(model), -mean, rtol=1e-12, atol=1e-12)
    model(np.ones((3, 1))).backward()
    replica.zero_grad()
    with pytest.raises(MissingBackward, match="step 1: no gradient"):
        replica.step()


def test_zero_grad_keeps_what_step_has_gathered(world: mpidl.World) -> None:
    model = Scale()
    replica = mpidl.DataParallel(model, optim.SGD(lr=1.0), accumulate=2, check_finite=True)
    for value in (2.0, 4.0):
        model(np.full((2, 1), value)).backward()
        replica.step()
        model(np.ones((50, 1))).backward()
        replica.zero_grad()
    np.testing.assert_allclose(weights_of(model), -3, rtol=1e-12)
    model(np.full((2, 1), np.nan)).backward()
    replica.step()
    replica.zero_grad()
    model(np.ones((2, 1))).backward()
    with pytest.raises(NonFiniteGradient):
        replica.step()
