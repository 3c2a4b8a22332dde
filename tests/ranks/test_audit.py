"""Ranks whose parameters have come to differ, or are no numbers, are told of by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.errors import InvalidArgument, NonFinite, RankMismatch
from tests.ranks.conftest import DEVICE, STRATEGIES, as_nodes

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="writes to memory as faults do")
several = pytest.mark.skipif(mpidl.init().size == 1, reason="one rank cannot differ")


def model(rng: np.random.Generator) -> nn.Module:
    nn.seed(int(rng.integers(2**31)))
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def make(
    world: mpidl.World, rng: np.random.Generator, strategy: str, **options: Any
) -> mpidl.DataParallel:
    return mpidl.DataParallel(
        model(rng), optim.SGD(lr=0.1), strategy, world=world, overlap=False, **options
    )


def train(replica: mpidl.DataParallel, own: np.random.Generator, steps: int = 1) -> None:
    for _ in range(steps):
        x = mpidl.tensor(own.standard_normal((4, 7)).astype(np.float32))
        (replica.model(x) ** 2).mean().backward()
        replica.step()


def flip(replica: mpidl.DataParallel, name: str, element: int, bit: int) -> float:
    """Flip one bit of a parameter, and return by how much that changes it."""
    values = next(p for flat in replica.buckets for n, p, _ in flat.views() if n == name)
    values = values.reshape(-1)
    before = float(values[element])
    values.view(np.uint32)[element] ^= np.uint32(1 << bit)
    return abs(float(values[element]) - before)


@on_cpu
@several
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_wrong_bit_is_found(
    strategy: str, world: mpidl.World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    """Of one rank, or, where a node's ranks share their parameters, of one node."""
    shared = STRATEGIES[strategy].shared
    if shared and world.size == 2:
        world = as_nodes(world, lambda rank: rank)
    elif shared:
        world = as_nodes(world, lambda rank: min(rank, 1))
    replica = make(world, rng, strategy, audit_every=2)
    train(replica, own, 3)
    replica.audit.look(3)
    culprit = int(rng.integers(world.size))
    name = str(rng.choice([*replica.parameters]))
    element = int(rng.integers(replica.parameters[name].size))
    bit = int(rng.integers(23))  # of the mantissa: else it may be infinite
    change = flip(replica, name, element, bit) if world.rank == culprit else 0.0
    world.barrier()
    with pytest.raises(RankMismatch, match=f"parameter {name} of rank") as caught:
        train(replica, own, 1)
    assert caught.value.collective
    text = str(caught.value)
    assert len(set(world.gather(text))) == 1
    told = re.match(r"step 3: .* of ranks? ([\d, ]+) is not .* ([\d.e+-]+) at most$", text)
    assert told is not None, text
    wrong = {int(r) for r in told[1].split(",")}
    copies = world.members if shared else tuple((r,) for r in range(world.size))
    (holders,) = (set(copy) for copy in copies if culprit in copy)
    everyone = set(range(world.size))
    assert (
        wrong == holders
        if len(holders) < world.size / 2
        else wrong in (holders, everyone - holders)
    )
    change = max(world.gather(change))
    np.testing.assert_allclose(float(told[2]), change, rtol=1e-2)
    assert f"1 of {replica.parameters[name].size} elements" in text
    replica.close()


@on_cpu
@pytest.mark.parametrize("strategy", ["allreduce", "hierarchical"])
def test_what_is_no_number_is_named(
    strategy: str, world: mpidl.World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    replica = make(world, rng, strategy, audit_every=1)
    train(replica, own)
    culprit, value = int(rng.integers(world.size)), float(rng.choice([np.nan, np.inf, -np.inf]))
    if world.rank == culprit:
        for flat in replica.buckets:
            for name, p, _ in flat.views():
                if name == "2.weight":
                    p.reshape(-1)[int(own.integers(p.size))] = value
    world.barrier()
    who = "rank" if STRATEGIES[strategy].shared else f"(every rank|rank {culprit})$"
    with (
        np.errstate(all="ignore"),
        pytest.raises(NonFinite, match=f"^step 1: parameter 2.weight holds .* {who}"),
    ):
        train(replica, own)
    replica.close()


@on_cpu
@several
def test_frozen_parameters_are_compared_too(
    world: mpidl.World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    one = model(rng)
    one.named_parameters()["0.weight"].requires_grad = False
    replica = mpidl.DataParallel(one, optim.SGD(lr=0.1), "allreduce", world=world, audit_every=1)
    train(replica, own)
    if world.rank == world.size - 1:
        one.named_parameters()["0.weight"].data[0, 0] += 1
    with pytest.raises(RankMismatch, match=rf"0.weight of rank {world.size - 1} is .* by 1 at"):
        train(replica, own)
    replica.close()


@pytest.mark.parametrize("every", [0, 3])
def test_it_looks_as_often_as_asked(
    every: int,
    world: mpidl.World,
    rng: np.random.Generator,
    own: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = make(world, rng, "allreduce", audit_every=every)
    looks: list[int] = []
    monkeypatch.setattr(replica.audit, "look", looks.append)
    train(replica, own, 7)
    assert looks == ([2, 5] if every else [])
    replica.close()


@pytest.mark.parametrize("strategy", ["allreduce", "ring"])
def test_local_steps_are_looked_at_when_they_have_been_averaged(
    strategy: str, world: mpidl.World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    replica = make(world, rng, strategy, audit_every=1, local_steps=3)
    train(replica, own, 8)
    replica.close()


@pytest.mark.parametrize("every", [-1, 1.5])
def test_what_cannot_be(every: Any, world: mpidl.World, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidArgument, match=f"audit_every={every}"):
        make(world, rng, "allreduce", audit_every=every)


def test_a_loss_that_is_no_number_ends_the_epoch(
    world: mpidl.World, rng: np.random.Generator
) -> None:
    """With the rank and the step; and with the parameter, where the update has spoiled it."""
    x = rng.standard_normal((12 * world.size, 7)).astype(np.float32)
    y = np.zeros((len(x), 3), np.float32)

    def fit(loss: Any) -> None:
        trainer = mpidl.Trainer(
            model(rng), loss, optim.SGD(lr=0.1), "allreduce", world=world, quiet=True
        )
        try:
            trainer.fit(mpidl.data.ArrayDataset(x, y), 1, 4 * world.size, shuffle=False)
        finally:
            trainer.close()

    calls = []

    def spoiled(output: Any, target: Any) -> Any:
        calls.append(1)
        loss = nn.mse(output, target)
        if len(calls) == 2 and world.rank == world.size - 1:
            loss.data[...] = np.nan
        return loss

    with pytest.raises(NonFinite, match="epoch 1: the loss is nan, from step 1 of 3 on"):
        fit(spoiled)
    with (
        np.errstate(all="ignore"),
        pytest.raises(NonFinite, match=r"step 3: parameter 2.bias holds NaN .* on (every|rank 0)"),
    ):
        fit(lambda output, target: nn.mse(output, target) * np.float32(np.inf))
