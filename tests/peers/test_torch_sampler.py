"""Samplers and the loader of mpidl.torch."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.data import ArrayDataset
from mpidl.data.batches import batches
from mpidl.errors import BatchTooLarge, InvalidArgument, RankMismatch

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()


class Squares(torch.utils.data.Dataset):
    """Pairs of a number and its square."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i)]), i * i


def globally(world: mpidl.World, sampler: Any) -> list[list[int]]:
    """Return the global batches that all ranks' parts make."""
    mine = list(sampler)
    everyone = world.gather(mine)
    assert {len(batches) for batches in everyone} == {len(mine)}
    return [list(chain(*parts)) for parts in zip(*everyone, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_order_is_mpidls_own(shuffle: bool, world: mpidl.World, rng: np.random.Generator) -> None:
    n, size, seed = int(rng.integers(7, 30)), int(rng.integers(1, 8)), int(rng.integers(9))
    sampler = hvd.Sampler(range(n), size, shuffle=shuffle, seed=seed)
    data = ArrayDataset(np.arange(n), np.arange(n))
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        alone = batches(data, size, world=None, seed=seed, epoch=epoch, shuffle=shuffle)
        want = [x.tolist() for x, _ in alone]
        assert len(sampler) == len(want)
        assert globally(world, sampler) == want
        assert globally(world, sampler) == want  # a finished epoch begins again


def test_going_on_in_an_epoch(world: mpidl.World, rng: np.random.Generator) -> None:
    sampler = hvd.Sampler(range(20), 3)
    sampler.set_epoch(2)
    whole = globally(world, sampler)
    stopped = hvd.Sampler(range(20), 3)
    stopped.set_epoch(2)
    steps = iter(stopped)
    for _ in range(3):
        next(steps)
    other = hvd.Sampler(range(20), 3)
    other.load_state_dict(stopped.state_dict())
    assert globally(world, other) == whole[3:]
    assert globally(world, other) == whole
    other.set_epoch(2)
    assert globally(world, other) == whole
    for wrong in (hvd.Sampler(range(20), 4), hvd.Sampler(range(20), 3, seed=1)):
        with pytest.raises(InvalidArgument, match="the state has"):
            wrong.load_state_dict(stopped.state_dict())


def test_what_is_refused(world: mpidl.World) -> None:
    with pytest.raises(BatchTooLarge):
        hvd.Sampler(range(3), 4)
    with pytest.raises(InvalidArgument):
        hvd.Sampler(range(3), 0)
    with pytest.raises(InvalidArgument):
        hvd.Sampler(range(3), 1).set_epoch(-1)
    if world.size > 1:
        with pytest.raises(RankMismatch):
            hvd.Sampler(range(9), 1 + world.rank)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_loader(workers: int, world: mpidl.World) -> None:
    """Parts may be empty: 7 samples in batches of 3 leave one in the last."""
    loader = hvd.loader(Squares(7), 3, num_workers=workers)
    found = list(loader)
    assert len(found) == len(loader) == 3
    for x, y in found:
        assert x.dim() == 2 and x.shape[1:] == (1,) and torch.equal(x[:, 0].long() ** 2, y)
        assert y.dtype == torch.int64
    numbers = chain(*world.gather([int(i) for x, _ in found for i in x[:, 0]]))
    assert sorted(numbers) == list(range(7))
    loader.set_epoch(1)
    whole = [x.tolist() for x, _ in loader]
    loader.set_epoch(1)
    steps = iter(loader)
    next(steps)
    state = loader.state_dict()
    assert state["done"] == 1
    other = hvd.loader(Squares(7), 3, num_workers=workers)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert [x.tolist() for x, _ in other] == whole[1:]
    assert other.state_dict()["done"] == 3


def test_a_look_at_a_batch_takes_none_away(world: mpidl.World) -> None:
    """On one rank alone, say: all ranks still make the same number of steps."""
    loader = hvd.loader(Squares(9), 2)
    loader.set_epoch(1)
    whole = [x.tolist() for x, _ in loader]
    loader.set_epoch(1)
    if world.rank == 0:
        assert next(iter(loader))[0].tolist() == whole[0]
    assert [x.tolist() for x, _ in loader] == whole
    state = {**loader.state_dict(), "done": 3}
    loader.load_state_dict(state)
    assert next(iter(loader))[0].tolist() == whole[3]
    assert [x.tolist() for x, _ in loader] == whole[3:]
    assert [x.tolist() for x, _ in loader] == whole


def test_own_collate(world: mpidl.World) -> None:
    def collate(samples: list[Any]) -> Any:
        return {"x": torch.stack([x for x, _ in samples]), "names": ["a"] * len(samples)}

    loader = hvd.loader(Squares(1), 1, collate_fn=collate)
    (batch,) = loader
    mine = world.rank == world.size - 1  # the one sample is the last rank's
    assert batch["x"].shape == (int(mine), 1) and len(batch["names"]) == mine


def test_elastic_sampler(world: mpidl.World, rng: np.random.Generator) -> None:
    n = int(rng.integers(10, 30))
    sampler = hvd.elastic.ElasticSampler(range(n), seed=3)
    mine = list(sampler)
    assert len(mine) == len(sampler) == -(-n // world.size)
    everyone = world.gather(mine)
    assert set(chain(*everyone)) == set(range(n))
    assert sum(map(len, everyone)) < n + world.size
    sampler.record_batch(0, 2)
    done = set(chain(*(part[:2] for part in everyone)))
    assert sampler.processed_indices == done
    other = hvd.elastic.ElasticSampler(range(n), seed=3)
    other.load_state_dict(sampler.state_dict())
    left = set(chain(*world.gather(list(other))))
    assert left == set(range(n)) - done
    sampler.set_epoch(1)
    assert sampler.processed_indices == set() and list(sampler) != mine
    in_order = hvd.elastic.ElasticSampler(range(n), shuffle=False)
    assert list(in_order)[:2] == [world.rank, world.rank + world.size]


def test_epochs_go_on_where_they_were(world: mpidl.World, rng: np.random.Generator) -> None:
    """In the middle of one, or at its end: every batch comes once."""
    dataset = torch.utils.data.TensorDataset(torch.arange(20))
    stop = int(rng.choice([1, 3, 4, 5, 8, 11]))

    def taken(loader: Any, most: int) -> list[Any]:
        found = []
        for epoch in loader.epochs(3):
            for (x,) in loader:
                found.append((epoch, x.tolist()))
                if len(found) == most:
                    return found
        return found

    expected = taken(hvd.loader(dataset, 6, seed=1), 100)
    assert len(expected) == 12 and [epoch for epoch, _ in expected] == sorted([0, 1, 2] * 4)
    first, second = hvd.loader(dataset, 6, seed=1), hvd.loader(dataset, 6, seed=1)
    found = taken(first, stop)
    second.load_state_dict(first.state_dict())
    assert found + taken(second, 100) == expected
