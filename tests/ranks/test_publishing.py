"""Parameters that come while the next forward pass begins: nobody sees one before it is there."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import functional, nn, optim
from mpidl.overlap import WATCHED
from mpidl.strategies import Hierarchical
from tests.ranks.conftest import PLACEMENTS, as_nodes, fewer_runs

pytestmark = fewer_runs

SGD = optim.SGD(0.1, momentum=0.9)
UPDATES = {
    "plain": (SGD, None),
    "norms of layers": (optim.LARS(0.1), None),
    "norm of all": (SGD, 0.5),
}


def network() -> nn.Sequential:
    nn.seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.Linear(30, 5))


def late(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parameters come late, by another time in each step."""
    publish, pause = strategy.publish, np.random.default_rng()

    def slowly(params: Any) -> Any:
        for i in publish(params):
            time.sleep(pause.uniform(0, 0.002))
            yield i

    monkeypatch.setattr(strategy, "publish", slowly)


def parallel(world: mpidl.World, model: nn.Module, **options: Any) -> mpidl.DataParallel:
    """Overlap on the nodes of `world`: by itself, a thread's world sees all ranks on one node."""
    node_of = {rank: node for node, ranks in enumerate(world.members) for rank in ranks}
    beside = replace(as_nodes(world.for_thread(), node_of.__getitem__), beside=True)
    options = {"optimizer": SGD, "bucket_bytes": 1000, **options}
    strategy = Hierarchical(beside)
    return mpidl.DataParallel(model, strategy=strategy, world=world, overlap=True, **options)


def batch(world: mpidl.World, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return all ranks' samples, and this rank's."""
    rows = 4 * world.size
    x, y = rng.standard_normal((rows, 20)).astype(np.float32), rng.integers(0, 5, rows)
    mine = slice(4 * world.rank, 4 * world.rank + 4)
    return (x, y), (x[mine], y[mine])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_20_steps_equal_one_process(
    placement: str,
    update: str,
    world: mpidl.World,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = as_nodes(world, PLACEMENTS[placement])
    model, alone = network(), network()
    optimizer, clip_norm = UPDATES[update]
    replica = parallel(nodes, model, optimizer=optimizer, clip_norm=clip_norm)
    late(replica.strategy, monkeypatch)
    one = mpidl.DataParallel(alone, optimizer, world=world.alone(), clip_norm=clip_norm)
    for _ in range(20):
        (x, y), (mine, labels) = batch(world, rng)
        functional.cross_entropy(model(mine), labels).backward()
        replica.step()
        functional.cross_entropy(alone(x), y).backward()
        one.step()
    assert replica._overlap is not None
    assert replica._overlap._publisher is not None
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=2e-5)
    values = b"".join(p.data.tobytes() for p in model.parameters())
    assert len(set(world.gather(values))) == 1
    replica.close()
    one.close()


READERS = {
    "data": lambda model: [p.data.copy() for p in model.parameters()],
    "state_dict": lambda model: list(model.state_dict().values()),
    "a copy": lambda model: [p.data for p in copy.deepcopy(model).parameters()],
    "a forward pass": lambda model: [model(np.ones((1, 20), np.float32)).data.copy()],
}


@pytest.fixture
def trained(world: mpidl.World, own: Any) -> Any:
    """Return a model, what trains it, on nodes of their own, and a step."""
    model = network()
    replica = parallel(as_nodes(world, lambda rank: rank), model)

    def step() -> None:
        x = own.standard_normal((4, 20)).astype(np.float32)
        functional.cross_entropy(model(x), own.integers(0, 5, 4)).backward()
        replica.step()

    for _ in range(WATCHED):
        step()
    yield model, replica, step
    replica.close()


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_waits(
    reader: str, trained: Any, world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.size == 1:
        pytest.skip("one rank owns everything")
    model, replica, step = trained
    publish, go = replica.strategy.publish, threading.Event()

    def held(params: Any) -> Any:
        go.wait()
        return publish(params)

    monkeypatch.setattr(replica.strategy, "publish", held)
    kinds = [type(p) for p in model.parameters()]
    step()
    threading.Timer(0.05, go.set).start()
    found = READERS[reader](model)
    assert go.is_set()
    replica.synchronize()
    assert isinstance(model.parameters()[0], nn.Parameter)
    for value, now in zip(found, READERS[reader](model), strict=True):
        np.testing.assert_array_equal(value, now)
    assert len(set(world.gather(b"".join(np.asarray(v).tobytes() for v in found)))) == 1
    assert [type(p) for p in model.parameters()] == kinds


@pytest.mark.parametrize("where", ["read", "step", "synchronize", "close"])
def test_what_goes_wrong_is_told(
    where: str, trained: Any, world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, replica, step = trained
    publish = replica.strategy.publish

    def fails(params: Any) -> Any:
        yield from publish(params[:1])
        raise OSError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(replica.strategy, "publish", fails)
        step()
    first, *_, last = model.parameters()
    if where == "read":
        with pytest.raises(OSError, match="network is down"):
            last.numpy()
    elif where == "step":
        with pytest.raises(OSError, match="network is down"):
            replica.step(0)
    elif where == "synchronize":
        with pytest.raises(OSError, match="network is down"):
            replica.synchronize()
    replica.close()
    assert type(first) is type(last) is nn.Parameter
    last.numpy()
    world.barrier()
