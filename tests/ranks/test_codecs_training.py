"""Training with each codec, every rank a node: how near it comes to training without."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.codecs import TopK
from tests.ranks.conftest import DEVICE, MPICH, as_nodes

EXAMPLES = Path(__file__).parents[2] / "examples"
#: codec -> by how much the test loss may be above that without: digits, characters
DISTANCES: dict[Any, tuple[float, float]] = {
    "fp16": (0.01, 0.01),
    "bf16": (0.01, 0.01),
    "int8": (0.02, 0.02),
    TopK(0.05): (0.3, 0.3),
    "powersgd": (0.3, 0.3),
    "signsgd": (0.3, 0.6),
}
NEAR = ("fp16", "bf16", "int8")
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or mpidl.init().size != 2 or MPICH,
    reason="once is enough: 2 ranks, under Open MPI",
)


@cache
def digits(codec: Any) -> float:
    world = mpidl.init()
    nn.seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train, test = data.digits()
    return train_loss(
        world, model, nn.cross_entropy, optim.SGD(0.05, momentum=0.9), codec, train, test, 5, 64
    )


@cache
def characters(codec: Any) -> float:
    sys.path.insert(0, str(EXAMPLES))
    try:
        example = importlib.import_module("char_transformer")
    finally:
        sys.path.remove(str(EXAMPLES))
    world = mpidl.init()
    nn.seed(0)
    train, test = data.text(argparse.__file__, example.LENGTH)
    model = example.Writer(len(train.vocabulary))
    return train_loss(world, model, example.loss, optim.AdamW(3e-3), codec, train, test, 2, 32)


def train_loss(
    world: mpidl.World, model: nn.Module, loss: Any, optimizer: Any, codec: Any,
    train: Any, test: Any, epochs: int, batch_size: int,
) -> float:  # fmt: skip
    """Return the test loss after training, which must be the same on all ranks."""
    nodes = as_nodes(world, lambda rank: rank)
    trainer = mpidl.Trainer(
        model, loss, optimizer, "hierarchical", world=nodes, codec=codec, overlap=False, quiet=True
    )
    history = trainer.fit(train, epochs, batch_size, evaluate=test)
    trainer.close()
    found = history[-1].metrics["loss"]
    assert len(set(world.gather(found))) == 1
    return found


@pytest.mark.parametrize("codec", DISTANCES, ids=str)
def test_digits(codec: Any) -> None:
    assert digits(codec) < digits(None) + DISTANCES[codec][0]


@pytest.mark.parametrize(
    "codec",
    # seconds each; these are near to what they stand for in any training
    [pytest.param(c, marks=pytest.mark.soak if c in NEAR else ()) for c in DISTANCES],
    ids=str,
)
def test_characters(codec: Any) -> None:
    assert characters(codec) < characters(None) + DISTANCES[codec][1]
