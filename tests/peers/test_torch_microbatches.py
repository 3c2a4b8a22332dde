"""Microbatches of a torch module: the same bits on any number of ranks."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data
from mpidl.errors import InvalidArgument, RankMismatch

torch = pytest.importorskip("torch")
mt = pytest.importorskip("mpidl.torch")
F = torch.nn.functional

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
}


def network() -> Any:
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(144, 4000)),
        *(torch.nn.ReLU(), torch.nn.Linear(4000, 4)),
    )


def parts(world: mpidl.World, x: Any, y: Any, batch: int, microbatches: int) -> Any:
    """Yield a rank's part of each global batch."""
    train = data.ArrayDataset(np.arange(len(x)), np.zeros(len(x)))
    made = data.batches(train, batch, world=world, seed=3, microbatches=microbatches)
    for _, shards in groupby(made.shards(), lambda shard: shard.step):
        rows = np.concatenate([shard.samples for shard in shards])
        yield x[rows], y[rows]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_bits_as_one_process(
    optimizer: str, world: mpidl.World, rng: np.random.Generator
) -> None:
    """With dropout, batch norm, clipping and an uneven last batch."""
    x = torch.from_numpy(rng.standard_normal((70, 1, 8, 8), np.float32))
    y = torch.from_numpy(rng.integers(0, 4, 70))
    count, batch, clip = int(rng.integers(1, 10)), int(rng.integers(10, 40)), rng.random() < 0.5
    results = []
    for ranks in (world, world.alone()):
        torch.manual_seed(4)
        module = network()
        own = OPTIMIZERS[optimizer](module.parameters())
        model = mt.DataParallel(module, own, world=ranks, microbatches=count)
        drawn = torch.get_rng_state()
        losses: list[float] = []
        for bx, by in parts(ranks, x, y, batch, count):
            for sx, sy in model.split(bx, by):
                loss = F.cross_entropy(model(sx), sy)
                loss.backward()
                losses.append(loss.item())
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            own.step()
        assert torch.equal(drawn, torch.get_rng_state())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = ranks.gather(losses)
        model.close()
        results.append((state, sorted(loss for of_rank in found for loss in of_rank)))
    (ours, our_losses), (theirs, their_losses) = results
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert our_losses == their_losses
    steps = -(-70 // batch)
    assert int(ours["1.num_batches_tracked"]) == steps


def test_mean_over_rows(world: mpidl.World, rng: np.random.Generator) -> None:
    """The gradient is that of the whole batch, whatever the sizes; a parameter unused has none."""
    rows, count = int(rng.integers(1, 20)), int(rng.integers(1, 7))
    x = torch.from_numpy(rng.standard_normal((rows, 5)))
    used, unused = torch.nn.Linear(5, 1).double(), torch.nn.Linear(5, 1).double()
    module = torch.nn.ModuleList([used, unused])
    expected = torch.autograd.grad(used(x).pow(2).mean(), list(used.parameters()))
    model = mt.DataParallel(module, world=world, microbatches=count, batch_dim=0)
    # what `broadcast` of rank 0's values has changed
    expected = torch.autograd.grad(used(x).pow(2).mean(), list(used.parameters()))
    for bx, _ in parts(world, x, x, rows, count):
        for sx in model.split(bx):
            used(sx).pow(2).mean().backward()
    for parameter, grad in zip(used.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert unused.weight.grad is None
    model.close()


def test_what_cannot_be(world: mpidl.World) -> None:
    plain = mt.DataParallel(torch.nn.Linear(3, 1), world=world)
    with pytest.raises(InvalidArgument, match="with microbatches="):
        plain.split(torch.zeros(2, 3))
    plain.close()
    with pytest.raises(InvalidArgument, match="microbatches="):
        mt.DataParallel(torch.nn.Linear(3, 1), world=world, microbatches=0)
    if world.size > 1:
        with pytest.raises(InvalidArgument, match="'ring'"):
            mt.DataParallel(torch.nn.Linear(3, 1), None, "ring", world=world, microbatches=2)
        with pytest.raises(RankMismatch, match="microbatches="):
            mt.DataParallel(torch.nn.Linear(3, 1), world=world, microbatches=2 + world.rank)


def test_parts_that_are_not_the_microbatches(world: mpidl.World) -> None:
    if world.size == 1:
        return
    model = mt.DataParallel(torch.nn.Linear(3, 1), world=world, microbatches=world.size)
    rows = 1 + 2 * (world.rank == 0)

    def step(rows: int) -> None:
        for x in model.split(torch.ones(rows, 3)):
            model(x).sum().backward()

    with pytest.raises(InvalidArgument, match=r"3 of the \d+ rows.*Sampler"):
        step(rows)
    step(2)  # and goes on
    model.close()


def test_a_backward_outside_of_the_loop(world: mpidl.World) -> None:
    model = mt.DataParallel(torch.nn.Linear(3, 1), world=world, microbatches=world.size)
    with pytest.raises(InvalidArgument, match="0 of its 1"):
        model(torch.ones(2, 3)).sum().backward()
    model.close()
