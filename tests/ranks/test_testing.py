"""Faults on purpose, in real steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.testing import Corrupt, Raise, inject
from tests.ranks.conftest import STRATEGIES
from tests.ranks.test_parallel import DEVICE_OF, make_data, make_model, weights_of


def step_once(replica: mpidl.DataParallel, train: data.ArrayDataset, xp: Any) -> None:
    world = replica.world
    (x, y), *_ = data.batches(train, 24, world=world, device=DEVICE_OF[xp.__name__])
    nn.cross_entropy(replica.model(x), y).backward()
    replica.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_raise_in_a_step(
    strategy: str, world: mpidl.World, rng: np.random.Generator, tmp_path: Path, xp: Any
) -> None:
    train = make_data(rng, 24, "float64")
    for number, moment in enumerate(("before", "update", "share")):
        model = make_model("float64", 7, xp)
        replica = mpidl.DataParallel(model, optim.SGD(0.1), strategy)
        record = tmp_path / str(number)
        faults = [Raise(r, 1, f"a leaf of {r}", moment) for r in range(world.size)]
        with inject(replica, *faults, record=record):
            step_once(replica, train, xp)
            with pytest.raises(RuntimeError, match=f"a leaf of {world.rank}"):
                step_once(replica, train, xp)
        assert replica.steps == 1
        told = json.loads((record / f"{world.rank}.json").read_text())
        assert (told["rank"], told["step"]) == (world.rank, 1)
        world.barrier()
        replica.close()


def test_a_corrupt_gradient_reaches_all_ranks(
    world: mpidl.World, rng: np.random.Generator, xp: Any
) -> None:
    train, seed = make_data(rng, 24, "float64"), int(rng.integers(1000))
    found = []
    for faults in ((), (Corrupt(step=1, bits=64),)):
        model = make_model("float64", 7, xp)
        replica = mpidl.DataParallel(model, optim.SGD(0.1))
        with inject(replica, *faults, seed=seed):
            step_once(replica, train, xp)
            first = weights_of(model)
            step_once(replica, train, xp)
        found.append((first, weights_of(model)))
        replica.close()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])
    assert len(set(world.gather(found[1][1].tobytes()))) == 1
