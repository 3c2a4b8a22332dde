"""Shards and batches: each sample once, whatever the number of ranks."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mpidl.data import ArrayDataset, Batches, batches, digits
from mpidl.errors import BatchTooLarge, DeviceNotFound, InvalidArgument

ROUNDS = 20


def numbers(n: int) -> ArrayDataset:
    """Return a data set whose sample i is (i, -i), so that it can be recognized."""
    return ArrayDataset(np.arange(n, dtype=np.float32)[:, None], -np.arange(n))


def epoch_of(n: int, batch_size: int, ranks: int, **options) -> list[list[np.ndarray]]:
    """Return, for each step, the samples of every rank."""
    settings = {"seed": 0, "epoch": 0, "shuffle": True, "device": "cpu", **options}
    everyone = [
        Batches(numbers(n), batch_size, rank=rank, size=ranks, **settings) for rank in range(ranks)
    ]
    shards = [[_samples(x, y) for x, y in one] for one in everyone]
    assert [len(one) for one in everyone] == [len(s) for s in shards]
    assert len({len(s) for s in shards}) == 1, "ranks make unequally many steps"
    return [list(step) for step in zip(*shards, strict=True)]


def _samples(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    np.testing.assert_array_equal(x[:, 0], -y)
    return -y


def order(steps: list[list[np.ndarray]]) -> list[int]:
    return [int(i) for step in steps for shard in step for i in shard]


def random_sizes(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a number of samples, a batch size, and a number of ranks, perhaps larger than it."""
    n = int(rng.integers(1, 60))
    return n, int(rng.integers(1, n + 1)), int(rng.integers(1, 9))


def test_all_ranks_together_give_each_sample_once(rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        n, batch_size, ranks = random_sizes(rng)
        assert sorted(order(epoch_of(n, batch_size, ranks))) == list(range(n))


def test_steps_and_shards_are_as_equal_as_can_be(rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        n, batch_size, ranks = random_sizes(rng)
        steps = epoch_of(n, batch_size, ranks)
        assert len(steps) == -(-n // batch_size)
        totals = [sum(map(len, step)) for step in steps]
        assert totals[:-1] == [batch_size] * (len(steps) - 1)
        for step in steps:
            lengths = [len(shard) for shard in step]
            assert max(lengths) - min(lengths) <= 1


def test_the_order_does_not_depend_on_the_ranks(rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        n, batch_size, ranks = random_sizes(rng)
        options = {"seed": int(rng.integers(99)), "epoch": int(rng.integers(99))}
        alone = order(epoch_of(n, batch_size, 1, **options))
        assert order(epoch_of(n, batch_size, ranks, **options)) == alone


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def of(seed: int, epoch: int) -> list[int]:
        return order(epoch_of(50, 7, 1, seed=seed, epoch=epoch))

    assert of(1, 2) == of(1, 2)
    assert len({tuple(of(*pair)) for pair in ((1, 2), (1, 3), (2, 1), (2, 2))}) == 4


def test_iterating_again_gives_the_same() -> None:
    made = batches(numbers(20), 6, world=None)
    np.testing.assert_array_equal(
        np.concatenate([y for _, y in made]), np.concatenate([y for _, y in made])
    )


def test_without_shuffling_samples_come_in_order() -> None:
    assert order(epoch_of(20, 6, 3, shuffle=False)) == list(range(20))


def test_more_ranks_than_samples_leaves_some_without(rng: np.random.Generator) -> None:
    (step,) = epoch_of(2, 2, 5)
    assert sorted(map(len, step)) == [0, 0, 0, 1, 1]
    empty = next(shard for shard in step if not len(shard))
    assert empty.dtype == np.int64


def test_without_a_world_there_is_one_rank() -> None:
    made = batches(numbers(10), 4, world=None, seed=3, epoch=1)
    assert (made.rank, made.size, len(made)) == (0, 1, 3)
    assert [len(x) for x, _ in made] == [4, 4, 2]
    assert sorted(-y for _, ys in made for y in ys) == list(range(10))


def test_samples_are_copies() -> None:
    data = numbers(4)
    x, _ = next(iter(batches(data, 4, world=None, shuffle=False)))
    x += 1
    np.testing.assert_array_equal(data.x[:, 0], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 11}, BatchTooLarge, r"batch_size=11 is larger than .* of 10 samples"),
        ({"batch_size": 0}, InvalidArgument, "batch_size=0: expected a whole number from 1 on"),
        ({"batch_size": -3}, InvalidArgument, "batch_size=-3: expected a whole number from 1 on"),
        ({"seed": -1}, InvalidArgument, "seed=-1: expected a whole number from 0 on"),
        ({"epoch": -1}, InvalidArgument, "epoch=-1: expected a whole number from 0 on"),
        ({"device": "tpu"}, InvalidArgument, "device 'tpu'"),
    ],
)
def test_values_that_cannot_be(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batches(**{"dataset": numbers(10), "batch_size": 5, "world": None, **options})


def test_batches_for_a_gpu_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceNotFound, match="needs CuPy"):
        batches(numbers(10), 5, world=None, device="cuda")


def test_inputs_and_targets_must_be_equally_many() -> None:
    with pytest.raises(InvalidArgument, match="ArrayDataset: 3 inputs, but 4 targets"):
        ArrayDataset(np.zeros((3, 2)), np.zeros(4))


def test_digits() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (1438, 359)
    for part in (train, test):
        assert part.x.shape == (len(part), 64)
        assert part.y.shape == (len(part),)
        assert (part.x.dtype, part.y.dtype) == (np.float32, np.int64)
        assert (part.x.min(), part.x.max()) == (0, 1)
        assert set(part.y) == set(range(10))


def test_digits_are_split_in_two() -> None:
    """No two of the 1,797 pictures are the same, so a picture tells the sample."""
    train, test = ({x.tobytes() for x in part.x} for part in digits())
    assert len(train | test) == 1797
    assert not train & test


def test_digits_of_the_same_seed_are_the_same() -> None:
    for a, b in zip(digits(0.5, seed=3), digits(0.5, seed=3), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
    assert not np.array_equal(digits(seed=3)[1].y, digits(seed=4)[1].y)
    assert len(digits(0.5)[1]) == 898
