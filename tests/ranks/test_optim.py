"""Optimizers on owned parts: P ranks, whoever owns what, do what one process does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.array import CACHE_BLOCK_BYTES
from mpidl.errors import (
    BatchTooLarge,
    InvalidArgument,
    MissingBackward,
    NonFiniteGradient,
    RankMismatch,
)
from mpidl.optim import schedules
from mpidl.strategies import ParameterServer
from tests.ranks.conftest import STRATEGIES
from tests.ranks.test_parallel import (
    DEVICE_OF,
    TOLERANCES,
    make_data,
    make_model,
    train_alone,
    weights_of,
)
from tests.unit.optimizers import REFERENCES

# eps is large: what divides by small gradients makes much of how their sums were rounded
OPTIONS: dict[type, dict[str, Any]] = {
    optim.SGD: {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    optim.Adam: {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.01},
    optim.AdamW: {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1},
    optim.RMSprop: {"lr": 0.02, "eps": 1e-3, "momentum": 0.5, "centered": True},
    optim.Adagrad: {"lr": 0.1, "eps": 1e-3, "lr_decay": 0.1},
    optim.LARS: {"lr": 1.0, "trust": 0.1, "weight_decay": 0.01},
    optim.LAMB: {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1},
}
#: the last: every rank owns a part, and parameters lie on both sides of a cut
STRATEGIES_AND_ALL_SERVERS = [*STRATEGIES, "all servers"]
N, BATCH = 23, 3  # ranks without a sample, and a batch that is short


def make_strategy(name: str, world: mpidl.World) -> Any:
    return ParameterServer(world, servers=world.size) if name == "all servers" else name


def clipped(grads: list[np.ndarray], value: float, norm: float) -> list[np.ndarray]:
    grads = [np.clip(g.astype(np.float64), -value, value) for g in grads]
    size = np.sqrt(sum((g**2).sum() for g in grads))
    return [g * min(1, norm / (size + 1e-6)) for g in grads]


def alone(
    model: nn.Module,
    batches: Iterable[Any],
    optimizers: dict[str, tuple[type, dict[str, Any]]],
    value: float = np.inf,
    norm: float = np.inf,
) -> np.ndarray:
    """The reference: one process, and the optimizers' formulas. Returns the weights."""
    parameters = model.named_parameters()
    owner = {n: next(p for p in optimizers if fnmatchcase(n, p)) for n in parameters}
    now: dict[str, np.ndarray] = {}

    def gradients(pattern: str) -> Iterator[list[np.ndarray]]:
        while True:
            yield [now[n] for n in parameters if owner[n] == pattern]

    runs = {
        pattern: REFERENCES[kind](
            [p.data for n, p in parameters.items() if owner[n] == pattern],
            gradients(pattern),
            **options,
        )
        for pattern, (kind, options) in optimizers.items()
    }
    for x, y in batches:
        nn.cross_entropy(model(x), y).backward()
        now.update(
            zip(parameters, clipped([p.grad for p in model.parameters()], value, norm), strict=True)
        )
        for pattern, run in runs.items():
            mine = [p for n, p in parameters.items() if owner[n] == pattern]
            for p, updated in zip(mine, next(run), strict=True):
                p.data[...] = updated
        for p in model.parameters():
            p.zero_grad()
    return weights_of(model)


def together(
    world: mpidl.World, xp: Any, train: Any, dtype: str, seed: int, strategy: str, **options: Any
) -> tuple[np.ndarray, mpidl.DataParallel]:
    """One epoch on all ranks. Returns the weights."""
    model = make_model(dtype, seed, xp)
    replica = mpidl.DataParallel(model, strategy=make_strategy(strategy, world), **options)
    device = DEVICE_OF[xp.__name__]
    for x, y in data.batches(train, BATCH, world=world, seed=3, device=device):
        nn.cross_entropy(model(x), y).backward()
        replica.step()
    replica.flush()
    return weights_of(model), replica


def assert_close(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert found.dtype == dtype
    assert np.abs(found - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_every_optimizer_equals_one_process(
    strategy: str,
    kind: type,
    dtype: str,
    rng: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    train, seed, options = make_data(rng, N, dtype), int(rng.integers(1000)), OPTIONS[kind]
    found, replica = together(
        world, xp, train, dtype, seed, strategy, optimizer=kind(**options), bucket_bytes=300
    )
    batches = data.batches(train, BATCH, world=None, seed=3)
    expected = alone(make_model(dtype, seed), batches, {"*": (kind, options)})
    assert_close(found, expected, dtype)
    assert replica.steps == len(batches)
    assert len(replica.buckets) == len(replica.states) == (1 if dtype == "float32" else 2)


def test_owners_hold_their_part_of_the_state_only(
    rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    train = make_data(rng, N, "float64")
    _, replica = together(
        world, xp, train, "float64", 0, "all servers", optimizer=optim.Adam(), bucket_bytes=1 << 20
    )
    (bucket,), (state,) = replica.buckets, replica.states
    sizes = world.gather([array.size for array in state.values()])
    assert np.sum(sizes, axis=0).tolist() == [bucket.param.size] * 2
    assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_groups(
    strategy: str, dtype: str, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    train, seed = make_data(rng, N, dtype), int(rng.integers(1000))
    kinds = {"*.bias": optim.SGD, "2.*": optim.LARS, "*": optim.LAMB}
    made = {pattern: kind(**OPTIONS[kind]) for pattern, kind in kinds.items()}
    found, replica = together(world, xp, train, dtype, seed, strategy, optimizer=made)
    expected = alone(
        make_model(dtype, seed),
        data.batches(train, BATCH, world=None, seed=3),
        {pattern: (kind, OPTIONS[kind]) for pattern, kind in kinds.items()},
    )
    assert_close(found, expected, dtype)
    assert sorted(sorted(b.places) for b in replica.buckets) == [
        ["0.bias", "2.bias"],
        ["0.weight"],
        ["2.weight"],
    ]


@pytest.mark.parametrize("value", [np.inf, 0.05])
@pytest.mark.parametrize("norm", [np.inf, 0.1, 100.0])
@pytest.mark.parametrize("kind", [optim.SGD, optim.LAMB])
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_clipping(
    strategy: str,
    kind: type,
    norm: float,
    value: float,
    rng: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    """Over all buckets at once, and by the mean over ranks: not by what any rank finds alone."""
    train, seed, options = make_data(rng, N, "float64"), int(rng.integers(1000)), OPTIONS[kind]
    found, _ = together(
        world,
        xp,
        train,
        "float64",
        seed,
        strategy,
        optimizer=kind(**options),
        bucket_bytes=200,
        clip_norm=None if norm == np.inf else norm,
        clip_value=None if value == np.inf else value,
    )
    batches = data.batches(train, BATCH, world=None, seed=3)
    model = make_model("float64", seed)
    expected = alone(model, batches, {"*": (kind, options)}, value=value, norm=norm)
    assert_close(found, expected, "float64")


@pytest.mark.parametrize("bounds", [{"clip_norm": 1.0}, {"clip_value": 0.1}], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_clipping_of_parameters_that_fill_many_blocks(
    strategy: str,
    kind: type,
    bounds: dict[str, float],
    rng: np.random.Generator,
    world: mpidl.World,
    xp: Any,
) -> None:
    """What is elementwise is clipped and updated block by block."""

    class Product(nn.Module):
        def __init__(self, weight: Any) -> None:
            self.weight = nn.Parameter(weight)

        def forward(self, x: Any) -> Any:
            return (self.weight * x).sum()

    n = 3 * CACHE_BLOCK_BYTES // 8 + 5
    weight, grads = rng.standard_normal(n), rng.standard_normal((2, n))
    model = Product(xp.asarray(weight))
    optimizer = kind(**OPTIONS[kind])
    replica = mpidl.DataParallel(model, optimizer, make_strategy(strategy, world), **bounds)
    for g in grads:
        model(xp.asarray(g)).backward()
        replica.step(weight=1)
    replica.close()
    bound = {"value": bounds.get("clip_value", np.inf), "norm": bounds.get("clip_norm", np.inf)}
    *_, (expected,) = REFERENCES[kind](
        [weight], [clipped([g], **bound) for g in grads], **OPTIONS[kind]
    )
    assert_close(weights_of(model), expected, "float64")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_accumulation_is_the_mean_over_all_samples(
    strategy: str, dtype: str, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """Of unequal numbers of samples in each pass and on each rank, and of none."""
    seed, k = int(rng.integers(1000)), int(rng.integers(2, 5))
    optimizer = optim.SGD(lr=schedules.exponential(0.3, 0.8), momentum=0.9)
    counts = rng.integers(0, 4, (3 * k + 1, world.size)) * rng.integers(0, 2, (3 * k + 1, 1))
    counts[k - 1 :: k, 0] += 1  # each group has a sample
    counts[-1, 0] += 1
    batches = [[make_data(rng, n, dtype) for n in row] for row in counts]

    model = make_model(dtype, seed, xp)
    replica = mpidl.DataParallel(
        model, optimizer, make_strategy(strategy, world), accumulate=k, bucket_bytes=200
    )
    device = DEVICE_OF[xp.__name__]
    for i, row in enumerate(batches):
        assert replica.steps == i // k
        mine = row[world.rank]
        if len(mine):
            x, y = (mpidl.array.to_device(a, device) for a in (mine.x, mine.y))
            nn.cross_entropy(model(x), y).backward()
        replica.step(weight=len(mine))
    assert replica.steps == 3
    replica.flush()  # the one pass that is left
    assert replica.steps == 4
    replica.flush()
    assert replica.steps == 4
    replica.close()

    reference = make_model(dtype, seed)
    velocity = [np.zeros_like(p.data) for p in reference.parameters()]
    for step in range(4):
        group = [part for row in batches[step * k : (step + 1) * k] for part in row]
        x, y = (np.concatenate([getattr(part, name) for part in group]) for name in ("x", "y"))
        nn.cross_entropy(reference(x), y).backward()
        for p, v in zip(reference.parameters(), velocity, strict=True):
            v *= 0.9
            v += p.grad
            p.data -= 0.3 * 0.8**step * v
            p.zero_grad()
    assert_close(weights_of(model), weights_of(reference), dtype)


def test_passes_between_updates_communicate_nothing(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), accumulate=3)
    for step in range(6):
        model(np.ones((2, 5))).sum().backward()
        with monkeypatch.context() as patch:
            if step % 3 < 2:
                patch.setattr(replica, "world", None)
                patch.setattr(replica, "strategy", None)
                patch.setattr(replica, "update", None)
            replica.step()
    assert replica.steps == 2
    replica.close()


def test_a_problem_in_any_pass_is_raised_on_all_ranks(world: mpidl.World) -> None:
    """With the update, which is then not made; the next group is without a trace of this one."""
    model = make_model("float64", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), "ring", accumulate=3)
    before, last = weights_of(model), world.size - 1
    for i in range(3):
        if i != 1 or world.rank != last:
            (model(np.ones((2, 5))).sum() * 1e6).backward()
        if i < 2:
            replica.step(weight=2)
    with pytest.raises(MissingBackward, match=rf"rank {last}: step 0: no gradient"):
        replica.step(weight=2)
    np.testing.assert_array_equal(weights_of(model), before)
    assert replica.steps == 0
    replica.flush()  # nothing is left of the group
    np.testing.assert_array_equal(weights_of(model), before)
    reference = make_model("float64", 0)
    reference(np.ones((2, 5))).sum().backward()
    for _ in range(3):
        model(np.ones((2, 5))).sum().backward()
        replica.step()
    expected = np.concatenate([(p.data - 0.1 * p.grad).ravel() for p in reference.parameters()])
    np.testing.assert_allclose(weights_of(model), expected, rtol=1e-12)
    replica.close()


def test_a_group_without_a_sample(world: mpidl.World) -> None:
    replica = mpidl.DataParallel(make_model("float64", 0), optim.SGD(lr=0.1), accumulate=2)
    replica.step(weight=0)
    with pytest.raises(MissingBackward, match="step 0: no rank has a sample"):
        replica.step(weight=0)
    replica.step(weight=0)
    with pytest.raises(MissingBackward, match="step 0: no rank has a sample"):
        replica.flush()
    replica.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("strategy", STRATEGIES_AND_ALL_SERVERS)
def test_a_norm_that_is_not_finite(strategy: str, bad: float, world: mpidl.World, xp: Any) -> None:
    """Nothing is updated, not even another bucket, and the step can be left out."""
    model = make_model("float32", 0, xp)
    replica = mpidl.DataParallel(
        model, optim.SGD(lr=0.1), make_strategy(strategy, world), clip_norm=1.0, bucket_bytes=1
    )
    x, before = xp.ones((2, 5), np.float32), weights_of(model)
    nn.mse(model(x), xp.zeros((2, 3), np.float32)).backward()
    if world.rank == world.size - 1:
        model.layers[0].bias.grad[1] = bad
    with pytest.raises(NonFiniteGradient, match=rf"step 0: the norm .* gradient is {bad}"):
        replica.step()
    np.testing.assert_array_equal(weights_of(model), before)
    assert replica.steps == 0
    nn.mse(model(x), xp.zeros((2, 3), np.float32)).backward()
    replica.step()
    assert np.isfinite(weights_of(model)).all()
    assert (weights_of(model) != before).any()
    replica.close()


DIFFERENCES = {
    "optimizer": ({"optimizer": optim.SGD(0.1)}, {"optimizer": optim.SGD(0.2)}),
    "kind": ({"optimizer": optim.Adam()}, {"optimizer": optim.AdamW()}),
    "schedule": (
        {"optimizer": optim.SGD(schedules.cosine(0.1, 10))},
        {"optimizer": optim.SGD(schedules.cosine(0.1, 20))},
    ),
    "pattern": (
        {"optimizer": {"*.bias": optim.SGD(0.1), "*": optim.SGD(0.1)}},
        {"optimizer": {"*.weight": optim.SGD(0.1), "*": optim.SGD(0.1)}},
    ),
    "clip_norm": ({"clip_norm": 1.0}, {"clip_norm": 2.0}),
    "clip_value": ({"clip_value": 1.0}, {}),
    "accumulate": ({"accumulate": 2}, {"accumulate": 3}),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_arguments_that_differ(what: str, world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    usual, other = DIFFERENCES[what]
    options = {"optimizer": optim.SGD(0.1), **(other if world.rank == 1 else usual)}
    with pytest.raises(RankMismatch, match=r"rank 1: DataParallel: .*, but rank 0 has "):
        mpidl.DataParallel(make_model("float64", 0), **options)


def test_functions_as_rates_are_not_taken_for_different(world: mpidl.World) -> None:
    """Their addresses do differ."""
    unused = [object() for _ in range(1000 * world.rank)]
    optimizer = optim.SGD(lambda step: 0.1 / (1 + step))
    model = make_model("float64", 0)
    before = weights_of(model)
    replica = mpidl.DataParallel(model, optimizer)
    model(np.ones((2, 5))).sum().backward()
    replica.step()
    assert (weights_of(model) != before).any()
    replica.close()
    assert len(unused) == 1000 * world.rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": {"*.bias": optim.SGD(1)}}, r"no optimizer for parameter 0\.weight"),
        ({"optimizer": {"*": optim.SGD(1), "x": optim.SGD(1)}}, "pattern 'x' gets no parameter"),
        ({"accumulate": 0}, "accumulate=0: expected a whole number from 1 on"),
        ({"accumulate": 1.5}, "accumulate=1.5"),
        ({"clip_norm": -1}, "clip_norm=-1: expected 0 < clip_norm < inf"),
        ({"clip_value": 0}, "clip_value=0"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_raised_on_every_rank(
    options: dict[str, Any], message: str, world: mpidl.World
) -> None:
    """Also where one rank alone is wrong."""
    usual = {"optimizer": optim.SGD(0.1)}
    wrong = world.rank == world.size - 1
    with pytest.raises(InvalidArgument, match=message):
        mpidl.DataParallel(make_model("float64", 0), **(usual | options if wrong else usual))


def test_fit_with_everything(
    world: mpidl.World, rng: np.random.Generator, tmp_path: Path, xp: Any
) -> None:
    """41 samples in batches of 4: of the 11 passes of an epoch, the last 2 make an update."""
    train, folder = make_data(rng, 41, "float64"), world.broadcast(tmp_path)
    reference = make_model("float64", 7)
    train_alone(reference, train, 12, steps=8)
    model = make_model("float64", 7, xp)
    groups = {"*.bias": optim.SGD(0.2, momentum=0.9), "*": optim.SGD(0.2, momentum=0.9)}
    trainer = mpidl.Trainer(
        model,
        nn.cross_entropy,
        groups,
        accumulate=3,
        clip_norm=1e6,
        clip_value=1e6,
        out=folder,
        quiet=True,
    )
    history = trainer.fit(train, epochs=2, batch_size=4, seed=3)
    trainer.close()
    np.testing.assert_allclose(weights_of(model), weights_of(reference), rtol=1e-11, atol=1e-12)
    assert [epoch.steps for epoch in history] == [4, 8]
    world.barrier()
    config = json.loads((folder / "config.json").read_text())
    assert config["optimizer"]["*.bias"]["SGD"]["momentum"] == 0.9


def test_fit_passes_the_bounds_on(world: mpidl.World, rng: np.random.Generator) -> None:
    train = make_data(rng, 8, "float64")
    for option, longest in (("clip_norm", 1e-3), ("clip_value", 1e-3 * np.sqrt(75))):
        model = make_model("float64", 7)
        before = weights_of(model)
        trainer = mpidl.Trainer(
            model, nn.cross_entropy, optim.SGD(1.0), quiet=True, **{option: 1e-3}
        )
        trainer.fit(train, epochs=1, batch_size=8)
        trainer.close()
        assert 5e-4 < np.linalg.norm(weights_of(model) - before) <= longest * 1.001


def test_fit_with_a_growing_batch(
    world: mpidl.World, rng: np.random.Generator, tmp_path: Path
) -> None:
    train, folder = make_data(rng, 40, "float64"), world.broadcast(tmp_path)
    batch = schedules.growing_batch(5, at=(1, 3), factor=2)
    reference, model = make_model("float64", 7), make_model("float64", 7)
    velocity = [0.0 for _ in reference.parameters()]
    for epoch, size in enumerate((5, 10, 10, 20)):
        for x, y in data.batches(train, size, world=None, seed=3, epoch=epoch):
            nn.cross_entropy(reference(x), y).backward()
            for i, p in enumerate(reference.parameters()):
                velocity[i] = 0.5 * velocity[i] + p.grad
                p.data -= 0.1 * velocity[i]
                p.zero_grad()
    optimizer = optim.SGD(0.1, momentum=0.5)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optimizer, out=folder, quiet=True)
    history = trainer.fit(train, epochs=3, batch_size=batch, seed=3, evaluate=train)
    history += trainer.fit(train, epochs=1, batch_size=batch, seed=3)  # goes on with epoch 3
    trainer.close()
    assert [epoch.steps for epoch in history] == [8, 12, 16, 18]
    np.testing.assert_allclose(weights_of(model), weights_of(reference), rtol=1e-11, atol=1e-12)
    world.barrier()
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == {
        "growing_batch": {"size": 5, "at": [1, 3], "factor": 2, "limit": None}
    }


def test_a_batch_that_will_be_too_large_is_told_at_once(
    world: mpidl.World, rng: np.random.Generator
) -> None:
    model = make_model("float64", 7)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optim.SGD(0.1), quiet=True)
    batch = schedules.growing_batch(10, at=(2,), factor=5)
    with pytest.raises(BatchTooLarge, match="batch_size=50 is larger"):
        trainer.fit(make_data(rng, 40, "float64"), epochs=3, batch_size=batch)
    assert trainer.replica.steps == 0
    trainer.close()
