"""hvd.elastic: back to the last commit after an error, and on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()
from tests.peers.test_torch_checkpoint import OPTIMIZERS, Training, check_equal  # noqa: E402


def state_of(own: np.random.Generator, **others: Any) -> Any:
    """Return the state of a model that differs from rank to rank."""
    model = torch.nn.Linear(3, 1)
    model.weight.data = torch.from_numpy(own.standard_normal((1, 3)).astype(np.float32))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    return hvd.elastic.TorchState(model, optimizer, batch=0, **others)


def train_step(state: Any, x: Any) -> None:
    state.optimizer.zero_grad()
    state.model(x).square().mean().backward()
    state.optimizer.step()


def test_an_object_state(world: mpidl.World) -> None:
    state = hvd.elastic.ObjectState(hvd.broadcast_object, hvd.rank, epoch=0, seen=[world.rank])
    state.seen.append(1)
    state.restore()
    assert state.seen == [world.rank] and state.epoch == 0
    state.epoch = 1
    state.commit()
    state.epoch = 2
    state.restore()
    assert state.epoch == 1
    state.epoch = 3 + world.rank
    state.sync()
    assert state.epoch == 3 and state.seen == [0]
    state.epoch = 9
    state.restore()
    assert state.epoch == 3


def test_a_torch_state(world: mpidl.World, own: np.random.Generator) -> None:
    sampler = hvd.elastic.ElasticSampler(range(12))
    state = state_of(own, sampler=sampler, lr=0.5 + world.rank)
    model, optimizer, start = state.model, state.optimizer, state.model.weight.detach().clone()
    x = torch.ones(2, 3)
    state.model.bias.data.zero_()
    state.sync()
    root = torch.from_numpy(world.broadcast(start.numpy()))
    assert torch.equal(model.weight, root) and state.lr == 0.5
    train_step(state, x)
    sampler.record_batch(0, 1)
    state.batch = 1
    state.commit()
    kept = model.weight.detach().clone()
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    train_step(state, x)
    sampler.record_batch(1, 1)
    state.batch = 2
    assert not torch.equal(model.weight, kept)
    state.restore()
    assert state.model is model and state.optimizer is optimizer and state.sampler is sampler
    assert torch.equal(model.weight, kept) and state.batch == 1
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)
    assert sampler.processed_num == world.size


def test_errors_are_undone(world: mpidl.World, own: np.random.Generator) -> None:
    """The run with errors ends as the one without."""
    batches = [torch.from_numpy(own.standard_normal((2, 3)).astype(np.float32)) for _ in range(8)]
    first = state_of(own)
    second = state_of(own)
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        q.data.copy_(p.data)
    resets: list[int] = []
    second.register_reset_callbacks([lambda: resets.append(second.batch)])
    faults = {3, 6}

    @hvd.elastic.run
    def train(state: Any, faults: set[int]) -> str:
        for number in range(state.batch, len(batches)):
            train_step(state, batches[number])
            state.batch = number + 1
            if number in faults:
                faults.remove(number)
                state.model(batches[number]).sum().backward()  # on its way
                if world.size == 1:
                    raise hvd.HorovodInternalError("as if")
                hvd.allreduce(torch.ones(1 + min(world.rank, 1)), name="no two alike")
            if number % 2:
                state.commit()
        return "done"

    assert train(first, set()) == train(second, faults) == "done"
    assert resets == [2, 6]
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_errors_that_come_again_are_raised(world: mpidl.World, own: np.random.Generator) -> None:
    calls: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        calls.append(1)
        raise hvd.HorovodInternalError("each time")

    with pytest.raises(RuntimeError, match="each time"):
        train(state_of(own))
    assert 1 < len(calls) < 10
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == world.size


@pytest.mark.parametrize("by_commit", [False, True])
def test_hosts_that_change(by_commit: bool, world: mpidl.World, own: np.random.Generator) -> None:
    """Nothing is lost; rank 0 is told, and all begin again."""
    state = state_of(own)
    seen: list[int] = []
    state.register_reset_callbacks([lambda: seen.append(state.batch)])

    @hvd.elastic.run
    def train(state: Any) -> int:
        while state.batch < 6:
            state.batch += 1
            if state.batch == 3 and world.rank == 0:
                state.on_hosts_updated(1.0, None)
            if by_commit:
                state.commit()
            else:
                state.check_host_updates()
        return int(state.batch)

    assert train(state) == 6 and seen == [3]


def test_an_error_on_some_ranks_only(world: mpidl.World, own: np.random.Generator) -> None:
    """The others wait in an operation; it ends for them, too."""
    if world.size == 1:
        pytest.skip("takes another rank")
    calls: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> float:
        calls.append(1)
        if len(calls) == 1 and world.rank == 1:
            raise hvd.HorovodInternalError("here alone")
        state.optimizer.zero_grad()
        state.model(torch.ones(2, 3)).sum().backward()  # on its way, at first without rank 1
        return float(hvd.allreduce(torch.ones(1), op=hvd.Sum, name="all"))

    assert train(state_of(own)) == world.size
    assert len(calls) == 2


def test_a_replica_is_built_anew(
    world: mpidl.World, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a death: in the middle of an update, for other ranks, from the last commit."""
    options = {"microbatches": int(rng.integers(1, 6)), "optimizer": str(rng.choice([*OPTIMIZERS]))}
    seed = int(rng.integers(100))
    whole = Training(world.alone(), seed, **options)
    for _ in range(5):
        whole.step()
    one = Training(world, seed, **options)
    state = hvd.elastic.TorchState(one.model, one.optimizer, schedule=one.schedule, steps=one)
    for _ in range(3):
        one.step()
    state.commit()
    one.step()

    def share(_: Any) -> None:
        raise RuntimeError("as if")

    monkeypatch.setattr(one.model.strategy, "share", share)
    if one.model._owned is not None:
        with pytest.raises(RuntimeError, match="as if"):
            one.step()
    one.model.leave()
    one.model.leave()  # does nothing
    state.restore()
    assert one.steps == 3
    one.world = world.alone()
    one.model.enter(one.world)
    while one.steps < 5:
        one.step()
    check_equal(one.all(), whole.all())
    one.model.close()
    whole.model.close()
