"""Layers that remember, synchronize or draw numbers, in the hands of the training loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, RankMismatch
from tests.ranks.test_parallel import DEVICE_OF, make_data, weights_of


def make(xp: Any, *layers: nn.Module) -> nn.Sequential:
    nn.seed(3)
    model = nn.Sequential(nn.Linear(5, 8), *layers, nn.Tanh(), nn.Linear(8, 3))
    return model.astype("float64").to(DEVICE_OF[xp.__name__])


def buffers_of(model: nn.Module) -> np.ndarray:
    return np.concatenate([to_numpy(b.data).ravel() for b in model.buffers()])


def fit(model: nn.Module, train: Any, batch_size: int | None, **options: Any) -> mpidl.Trainer:
    optimizer = optim.SGD(lr=0.1, momentum=0.9)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optimizer, quiet=True)
    trainer.fit(train, 2, batch_size, **options)
    return trainer


@pytest.mark.parametrize(("n", "batch"), [(40, 12), (9, 3), (7, 5)])
def test_synchronized_batch_norm_equals_one_process(
    n: int, batch: int, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """Also where ranks have no samples: they join in, or the others would wait for ever."""
    train = make_data(rng, n, "float64")
    alone = make(np, nn.BatchNorm1d(8))
    sgd, states = optim.SGD(lr=0.1, momentum=0.9), {}
    for epoch in range(2):
        for x, y in data.batches(train, batch, world=None, seed=1, epoch=epoch):
            nn.cross_entropy(alone(x), y).backward()
            for name, p in alone.named_parameters().items():
                state = states.setdefault(name, sgd.init(p.data.reshape(-1)))
                flat, layers = (p.data.reshape(-1), p.grad.reshape(-1)), optim.Layers((), np.array)
                sgd.update(*flat, state, 0, layers, iter([(slice(None), flat[1])]))
                p.zero_grad()
    model = make(xp, nn.BatchNorm1d(8, sync=True))
    fit(model, train, batch, seed=1)
    np.testing.assert_allclose(weights_of(model), weights_of(alone), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(buffers_of(model), buffers_of(alone), rtol=1e-10, atol=1e-11)


def test_buffers_start_as_those_of_rank_0(world: mpidl.World, xp: Any) -> None:
    model = make(xp, nn.BatchNorm1d(8))
    for buffer in model.buffers():
        buffer.data[...] = world.rank + 5
    mpidl.DataParallel(model, optim.SGD(lr=0.1))
    np.testing.assert_array_equal(buffers_of(model), np.full(16, 5.0))


def test_buffers_are_averaged_where_each_rank_has_its_own(
    rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    model = make(xp, nn.BatchNorm1d(8))
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1))
    for buffer in model.buffers():
        buffer.data[...] = world.rank
    replica.average_buffers()
    np.testing.assert_array_equal(buffers_of(model), np.full(16, (world.size - 1) / 2))
    third = np.float32(1) / 3
    for buffer in model.buffers():
        buffer.data[...] = third
    before = buffers_of(model)
    replica.average_buffers()
    np.testing.assert_array_equal(buffers_of(model), before)  # equal ones keep their bits

    fit(make(xp, nn.BatchNorm1d(8)), make_data(rng, 40, "float64"), 12)
    model = make(xp, nn.BatchNorm1d(8))
    fit(model, make_data(rng, 40, "float64"), 12)
    assert len(set(world.gather(buffers_of(model).tobytes()))) == 1


def test_models_whose_buffers_differ(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    model = make(np, nn.BatchNorm1d(8))
    if world.rank == world.size - 1:
        model.layers[1].running_mean = nn.Buffer(np.zeros(7))
    with pytest.raises(RankMismatch, match=r"buffer 1\.running_mean of shape \(7,\)"):
        mpidl.DataParallel(model, optim.SGD(lr=0.1))


def test_dropout_depends_on_seed_epoch_step_and_place_only(
    rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    """Twice the same, whatever was drawn before; another seed is another training."""
    train = make_data(rng, 40, "float64")

    def train_once(seed: int, drawn: int) -> np.ndarray:
        model = make(xp, nn.Dropout(0.4))
        nn.random.generator(xp).random(drawn)
        fit(model, train, 12, seed=seed, shuffle=False)
        return weights_of(model)

    first = train_once(1, 0)
    np.testing.assert_array_equal(train_once(1, 5), first)
    assert not np.array_equal(train_once(2, 0), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_in_place_of_a_data_set(
    workers: int, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    train = make_data(rng, 40, "float64")
    expected = make(xp)
    fit(expected, train, 12, seed=4)
    model = make(xp)
    with data.Loader(train, 12, world=world, workers=workers, seed=4) as loader:
        fit(model, loader, None)
    np.testing.assert_array_equal(weights_of(model), weights_of(expected))


def test_a_batch_size_is_for_data_sets(rng: np.random.Generator, world: mpidl.World) -> None:
    train = make_data(rng, 20, "float64")
    trainer = mpidl.Trainer(make(np), nn.cross_entropy, optim.SGD(lr=0.1), quiet=True)
    with pytest.raises(InvalidArgument, match="batch_size=None: expected for a data set"):
        trainer.fit(train, 1)
    with (
        data.Loader(train, 5, world=world, workers=0) as loader,
        pytest.raises(InvalidArgument, match=r"batch_size=5: .* not for a Loader"),
    ):
        trainer.fit(loader, 1, 5)
