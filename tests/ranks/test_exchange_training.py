"""Training with each codec: how near it comes to training without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.codecs import CODECS, TopK
from tests.ranks.conftest import as_nodes, fewer_runs

pytestmark = fewer_runs


NEAR = ("bf16", "fp16", "int8")  # to what they stand for, in any training


@pytest.mark.parametrize(
    "codec",
    [
        *(pytest.param(codec, marks=pytest.mark.soak) for codec in NEAR),
        *(None, *sorted(set(CODECS) - {"topk", *NEAR}), TopK(0.1)),
    ],
    ids=str,
)
def test_training_comes_near_to_that_without(
    codec: Any, world: mpidl.World, rng: np.random.Generator
) -> None:
    """A regression on all data, each rank a node; told in the distance from the solution."""
    nodes = as_nodes(world, lambda rank: rank)
    x = rng.standard_normal((64 * world.size, 40)).astype(np.float32)
    solution = rng.standard_normal((40, 30)).astype(np.float32)
    mine = slice(64 * world.rank, 64 * (world.rank + 1))
    nn.seed(0)
    model = nn.Linear(40, 30, bias=False)
    replica = mpidl.DataParallel(
        model, optim.SGD(1.0), "hierarchical", world=nodes, codec=codec, overlap=False
    )
    for _ in range(500):
        error = model(x[mine]) - x[mine] @ solution
        (error * error).mean().backward()
        replica.step()
    found = np.asarray(model.weight.data).T
    distance = np.sqrt(np.mean((found - solution) ** 2))
    assert distance < 0.1
    assert len(set(world.gather(found.tobytes()))) == 1
    replica.close()
