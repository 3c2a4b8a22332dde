"""The loader on several ranks: shards as `data.batches` cuts them, errors on all ranks."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, RankMismatch
from tests.ranks.test_parallel import DEVICE_OF, make_data, make_model, weights_of
from tests.transforms import noisy, numbers, shift

WORKERS = [0, 2]


@pytest.mark.parametrize("workers", WORKERS)
def test_shards_are_those_of_batches(
    workers: int, world: mpidl.World, rng: np.random.Generator, xp: Any
) -> None:
    """Also where a rank has no sample."""
    n = int(rng.integers(1, 20))
    settings = {"batch_size": int(rng.integers(1, n + 1)), "world": world}
    settings |= {"seed": int(rng.integers(99)), "device": DEVICE_OF[xp.__name__]}
    transform = functools.partial(shift, by=0.5)
    with data.Loader(numbers(n), workers=workers, transform=transform, **settings) as loader:
        for epoch in range(2):
            wanted = data.batches(numbers(n), epoch=epoch, **settings)
            everything = []
            for (x, y), (reference, targets) in zip(loader, wanted, strict=True):
                assert isinstance(x, xp.ndarray) and isinstance(y, xp.ndarray)
                moved = 0.5 if len(y) else 0
                np.testing.assert_array_equal(to_numpy(x), to_numpy(reference) + moved)
                np.testing.assert_array_equal(to_numpy(y), to_numpy(targets))
                everything += to_numpy(y).tolist()
            assert sorted(chain.from_iterable(world.gather(everything))) == list(range(n))


def test_random_numbers_differ_from_rank_to_rank_not_from_worker_to_worker(
    world: mpidl.World, rng: np.random.Generator
) -> None:
    n = 4 * world.size
    found = []
    for workers in WORKERS:
        with data.Loader(numbers(n), n, world=world, workers=workers, transform=noisy) as loader:
            ((x, y),) = loader.epoch(3)
            found.append((x, y))
    ((x, y),) = data.batches(numbers(n), n, world=world, epoch=3)
    sequence = np.random.SeedSequence([0, 3], spawn_key=(0, 4 * world.rank))
    wanted = noisy(x, y, np.random.default_rng(sequence))
    for pair in found:
        np.testing.assert_array_equal(pair[0], wanted[0])
        np.testing.assert_array_equal(pair[1], wanted[1])


def test_training_is_the_same(world: mpidl.World, rng: np.random.Generator, xp: Any) -> None:
    train = make_data(rng, 37, "float64")
    weights = []
    for workers in WORKERS:
        model = make_model("float64", 7, xp)
        replica = mpidl.DataParallel(model, optim.SGD(lr=0.2))
        device = DEVICE_OF[xp.__name__]
        with data.Loader(
            train, 10, world=world, workers=workers, device=device, transform=noisy
        ) as loader:
            for _ in range(2):
                for x, y in loader:
                    if len(x):
                        nn.cross_entropy(model(x), y).backward()
                    replica.step(weight=len(x))
        weights.append(weights_of(model))
        replica.close()
    np.testing.assert_array_equal(weights[1], weights[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"transform": lambda x, y, _: (x, y)}, "the transform cannot be sent to a worker"),
    ],
    ids=["workers", "prefetch", "lambda"],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(
    options: dict, message: str, world: mpidl.World
) -> None:
    last = world.size - 1
    wrong = options if world.rank == last else {}
    with pytest.raises(InvalidArgument, match=f"(rank {last}|every rank): .*{message}"):
        data.Loader(numbers(10), 5, world=world, **wrong)


def test_ranks_must_agree_on_the_epoch(world: mpidl.World) -> None:
    if world.size == 1:
        return
    with (
        data.Loader(numbers(10), 5, world=world, workers=1) as loader,
        pytest.raises(RankMismatch, match=r"epoch=1.*, but rank 0 has .*epoch=0"),
    ):
        loader.epoch(min(1, world.rank))


def test_ranks_may_have_unequally_many_workers(world: mpidl.World) -> None:
    with data.Loader(numbers(23), 5, world=world, workers=world.rank % 3) as loader:
        mine = [int(i) for _, y in loader for i in y]
    assert sorted(chain.from_iterable(world.gather(mine))) == list(range(23))
