"""Local SGD: what one does in between, and that all are equal afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import functional, nn, optim
from mpidl.errors import InvalidArgument, NonFiniteGradient
from tests.ranks.conftest import PLACEMENTS, STRATEGIES, as_nodes, fewer_runs

pytestmark = fewer_runs
EVERY = 3


def make_model() -> nn.Module:
    nn.seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def values(model: nn.Module) -> Any:
    return np.concatenate([np.asarray(p.data).reshape(-1) for p in model.parameters()])


def steps_of(model: nn.Module, replica: mpidl.DataParallel, batches: Any) -> list[Any]:
    found = []
    for x, y in batches:
        functional.cross_entropy(model(x), y).backward()
        replica.step()
        found.append(values(model))
    return found


def draw(own: np.random.Generator, count: int = 7) -> Any:
    return [
        (own.standard_normal((4, 6)).astype(np.float32), own.integers(0, 3, 4))
        for _ in range(count)
    ]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "hierarchical"])
def test_steps_alone_and_then_the_mean(strategy: str, world: mpidl.World, own: Any) -> None:
    batches = draw(own)
    model = make_model()
    replica = mpidl.DataParallel(
        model, optim.SGD(0.1, momentum=0.9), strategy, world=world, local_steps=EVERY
    )
    found = steps_of(model, replica, batches)
    alone = make_model()
    single = mpidl.DataParallel(
        alone, optim.SGD(0.1, momentum=0.9), "allreduce", world=world.alone()
    )
    expected = steps_of(alone, single, batches[: EVERY - 1])
    np.testing.assert_array_equal(found[: EVERY - 1], expected)
    steps_of(alone, single, batches[EVERY - 1 : EVERY])
    mean = np.mean(world.gather(values(alone)), axis=0)
    np.testing.assert_allclose(found[EVERY - 1], mean, rtol=0, atol=1e-6)
    for step, now in enumerate(found, 1):
        together = len({v.tobytes() for v in world.gather(now)}) == 1
        assert together == (step % EVERY == 0 or world.size == 1)
    mean = np.mean(world.gather(found[-1]), axis=0)
    replica.synchronize()
    np.testing.assert_allclose(values(model), mean, rtol=0, atol=1e-6)
    replica.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ranks_of_a_node_step_together(placement: str, world: mpidl.World, own: Any) -> None:
    nodes = as_nodes(world, PLACEMENTS[placement])
    model = make_model()
    replica = mpidl.DataParallel(
        model, optim.SGD(0.1), "hierarchical", world=nodes, local_steps=EVERY
    )
    found = steps_of(model, replica, draw(own))
    for step, now in enumerate(found, 1):
        everywhere = [v.tobytes() for v in world.gather(now)]
        for members in nodes.members:
            assert len({everywhere[r] for r in members}) == 1
        assert (len(set(everywhere)) == 1) == (step % EVERY == 0 or nodes.nodes == 1)
    replica.synchronize()
    assert len({v.tobytes() for v in world.gather(values(model))}) == 1
    replica.close()


def test_the_trainer_ends_an_epoch_with_equal_ranks(world: mpidl.World) -> None:
    nn.seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    train, test = mpidl.data.digits()
    trainer = mpidl.Trainer(
        model,
        nn.cross_entropy,
        optim.SGD(0.1, momentum=0.9),
        world=world,
        local_steps=4,
        quiet=True,
    )
    history = trainer.fit(train, epochs=4, batch_size=64, evaluate=test)
    assert history[-1].metrics["accuracy"] > 0.9
    assert len({v.tobytes() for v in world.gather(values(model))}) == 1
    trainer.close()


def test_errors_of_one_rank_leave_all_in_step(world: mpidl.World, own: Any) -> None:
    """Steps that fail count: all ranks average after the same ones."""
    model = make_model()
    replica = mpidl.DataParallel(
        model, optim.SGD(0.1), "allreduce", world=world, local_steps=EVERY, check_finite=True
    )
    for step, (x, y) in enumerate(draw(own, 8), 1):
        bad = (step + world.rank) % 4 == 0  # another rank in each step
        functional.cross_entropy(model(np.full_like(x, np.nan) if bad else x), y).backward()
        if bad:
            with pytest.raises(NonFiniteGradient):
                replica.step()
            replica.zero_grad()
        else:
            replica.step()
        together = len({v.tobytes() for v in world.gather(values(model))}) == 1
        assert together == (step % EVERY == 0)
    replica.synchronize()
    assert len({v.tobytes() for v in world.gather(values(model))}) == 1
    replica.synchronize()
    replica.close()


@pytest.mark.parametrize(("strategy", "codec"), [("hierarchical", "bf16"), ("adasum", None)])
def test_the_mean_of_parameters_is_neither_encoded_nor_another_rule(
    strategy: str, codec: str | None, world: mpidl.World
) -> None:
    with pytest.raises(InvalidArgument, match=r"local_steps=2 with (Bf16|Adasum)"):
        mpidl.DataParallel(
            make_model(), optim.SGD(0.1), strategy, world=world, local_steps=2, codec=codec
        )


@pytest.mark.parametrize("value", [0, 1.5, -1])
def test_steps_are_whole_numbers(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"local_steps=.*: expected a whole number"):
        mpidl.DataParallel(make_model(), optim.SGD(0.1), local_steps=value)
