"""The asynchronous parameter server: each push counts as it would, one after the other."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, MissingBackward
from mpidl.strategies import ParameterServer
from tests.ranks.conftest import DEVICE

RANKS = mpidl.init().size
SHAPES = [(1,), (3,), (5, 7), (1,), (40, 25)]  # some shorter than there are servers
NO_BOUND = 10**6


class Bowl(nn.Module):
    """A loss whose gradient is p - x for parameters p: what it is computed from tells."""

    def __init__(self, shapes: Any = SHAPES, dtype: str = "float64") -> None:
        for i, shape in enumerate(shapes):
            setattr(self, f"p{i}", nn.Parameter(np.zeros(shape, dtype)))

    def forward(self, x: list[Any]) -> Any:
        terms = [((p - v) ** 2).sum() for p, v in zip(self.parameters(), x, strict=True)]
        return sum(terms[1:], terms[0]) * 0.5


class Slope(Bowl):
    """A loss whose gradient is x."""

    def forward(self, x: list[Any]) -> Any:
        terms = [(p * v).sum() for p, v in zip(self.parameters(), x, strict=True)]
        return sum(terms[1:], terms[0])


def make(
    world: mpidl.World,
    optimizer: Any,
    model: nn.Module | None = None,
    *,
    servers: int = 1,
    staleness: int = NO_BOUND,
    **options: Any,
) -> mpidl.DataParallel:
    if model is None:
        model = Bowl()
    if DEVICE != "cpu":
        model.to("cuda")
    strategy = ParameterServer(world, servers, asynchronous=True, staleness=staleness)
    return mpidl.DataParallel(model, optimizer, strategy, world=world, **options)


def push(replica: mpidl.DataParallel, x: list[Any], weight: float = 1) -> None:
    device = "cpu" if DEVICE == "cpu" else "cuda"
    replica.model([mpidl.array.to_device(v, device) for v in x]).backward()
    replica.step(weight)


def values(replica: mpidl.DataParallel) -> list[Any]:
    return [to_numpy(p.data).copy() for p in replica.model.parameters()]


def drawn(rng: np.random.Generator, shapes: Any = SHAPES) -> list[Any]:
    return [rng.standard_normal(shape) for shape in shapes]


def threads() -> int:
    return sum(thread.name == "mpidl server" for thread in threading.enumerate())


@dataclass
class Sequential:
    """What servers and ranks should come to, in one process, one push after the other."""

    optimizer: Any
    ranks: int
    staleness: int
    clip: float | None = None

    def __post_init__(self) -> None:
        self.params = [np.zeros(shape).ravel() for shape in SHAPES]
        self.states = [self.optimizer.init(p) for p in self.params]
        self.at = [[p.copy() for p in self.params] for _ in range(self.ranks)]
        self.versions, self.dropped = [0] * self.ranks, [0] * self.ranks
        self.ages: Counter[int] = Counter()
        self.updates = 0

    def step(self, rank: int, x: list[Any], weight: float) -> None:
        age = self.updates - self.versions[rank]
        if weight and age > self.staleness * self.ranks:
            self.dropped[rank] += 1
        elif weight:
            lr = self.optimizer.lr
            lr = lr(self.updates // self.ranks) if callable(lr) else lr
            optimizer = replace(self.optimizer, lr=lr / self.ranks)
            for p, mine, v, state in zip(self.params, self.at[rank], x, self.states, strict=True):
                g = mine - v.ravel()
                if self.clip is not None:
                    g = g.clip(-self.clip, self.clip)
                optimizer.update(p, g, state, self.updates, None, iter([(slice(0, p.size), g)]))
            self.ages[age] += 1
            self.updates += 1
        self.versions[rank] = self.updates
        self.at[rank] = [p.copy() for p in self.params]


CASES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": optim.SGD(0.4)},
    "momentum": {"optimizer": optim.SGD(0.3, momentum=0.9, weight_decay=0.01)},
    "adam": {"optimizer": optim.AdamW(0.1), "servers": 2},
    "a schedule": {"optimizer": optim.SGD(lambda step: 0.5 / (1 + step)), "servers": 3},
    "clipped": {"optimizer": optim.SGD(0.3, momentum=0.5), "clip_value": 0.2, "servers": 2},
    "bound 0": {"optimizer": optim.SGD(0.4), "staleness": 0},
    "bound 1": {"optimizer": optim.RMSprop(0.1), "staleness": 1, "servers": RANKS},
}


@pytest.mark.parametrize("bucket_bytes", [64, 4096, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_pushes_in_a_known_order(
    world: mpidl.World, rng: np.random.Generator, case: str, bucket_bytes: int
) -> None:
    """Ranks take random turns, and so make unequal numbers of steps; some have no samples."""
    options = {"servers": 1, "staleness": NO_BOUND, **CASES[case]}
    options["servers"] = min(options["servers"], RANKS)
    expected = Sequential(
        options["optimizer"], RANKS, options["staleness"], options.get("clip_value")
    )
    replica = make(world, bucket_bytes=bucket_bytes, **options)
    for _ in range(5 * RANKS):
        rank, x, weight = int(rng.integers(RANKS)), drawn(rng), float(rng.integers(4))
        expected.step(rank, x, weight)
        if world.rank == rank:
            push(replica, x, weight)
            for found, p in zip(values(replica), expected.at[rank], strict=True):
                np.testing.assert_allclose(found.ravel(), p, rtol=1e-10, atol=1e-12)
        world.barrier()
    replica.synchronize()
    for found, p in zip(values(replica), expected.params, strict=True):
        np.testing.assert_allclose(found.ravel(), p, rtol=1e-10, atol=1e-12)
    assert len(set(world.gather(b"".join(v.tobytes() for v in values(replica))))) == 1
    assert replica.update.dropped == expected.dropped[world.rank]
    serves = any(part.stop > part.start for part in map(replica.strategy.owned, [1000]))
    assert replica.update.updates == (expected.updates if serves else 0)
    assert replica.update.staleness == (expected.ages if serves else {})
    replica.close()


@pytest.mark.skipif(RANKS == 1, reason="alone, nothing is ever stale")
@pytest.mark.parametrize("beyond", [0, 1])
def test_the_bound_is_exact(world: mpidl.World, rng: np.random.Generator, beyond: int) -> None:
    staleness, last, x = 2, RANKS - 1, drawn(rng)
    replica = make(world, optim.SGD(0.1), servers=RANKS, staleness=staleness)
    before = staleness * RANKS + beyond
    if world.rank == 0:
        for _ in range(before):
            push(replica, x)
    world.barrier()
    if world.rank == last:
        push(replica, x)
    world.barrier()
    assert replica.update.dropped == (beyond if world.rank == last else 0)
    assert replica.update.updates == before + 1 - beyond
    replica.close()


@pytest.mark.skipif(RANKS == 1, reason="nobody to wait for")
@pytest.mark.parametrize("servers", [1, RANKS])
def test_nobody_waits_for_a_slow_rank(world: mpidl.World, own: Any, servers: int) -> None:
    """The last rank makes no step until all others have made many more than the bound."""
    last, steps = RANKS - 1, 5 * RANKS
    replica = make(world, optim.SGD(0.1), servers=servers, staleness=1)
    if world.rank == last:
        for rank in range(last):
            world.comm.recv(source=rank)
        push(replica, drawn(own))
        assert replica.update.dropped == 1
        push(replica, drawn(own))  # it went on from the newest
        assert replica.update.dropped == 1
    else:
        for _ in range(steps):
            push(replica, drawn(own))
        world.comm.send(None, last)
    world.barrier()
    replica.close()


@pytest.mark.parametrize("servers", sorted({1, RANKS // 2 or 1, RANKS}))
def test_random_delays_and_unequal_numbers_of_steps(
    world: mpidl.World, rng: np.random.Generator, own: np.random.Generator, servers: int
) -> None:
    """Plain sums, in whatever order: nothing is lost, and nothing counts twice."""
    shapes = [(3,), (700, 300), (1,), (64, 64)]
    replica = make(world, optim.SGD(0.5), Slope(shapes), servers=servers, bucket_bytes=100_000)
    x, steps = drawn(own, shapes), int(own.integers(3, 15))
    for _ in range(steps):
        time.sleep(own.uniform(0, 4e-3) * own.integers(2))
        push(replica, x)
    replica.synchronize()
    pushed = world.gather((steps, x))
    assert replica.steps == steps
    if replica.update.updates:
        assert replica.update.updates == sum(n for n, _ in pushed)
    for i, found in enumerate(values(replica)):
        expected = -0.5 / RANKS * sum(n * other[i] for n, other in pushed)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    replica.close()


def test_no_update_is_older_than_the_bound(world: mpidl.World, own: np.random.Generator) -> None:
    replica = make(world, optim.SGD(0.1), staleness=1)
    steps = int(own.integers(10, 30))
    for _ in range(steps):
        time.sleep(own.uniform(0, 2e-3) * own.integers(2))
        push(replica, drawn(own))
    replica.synchronize()
    pushes, dropped = map(int, world.sum([steps, replica.update.dropped]))
    if world.rank == 0:
        assert max(replica.update.staleness) <= RANKS
        assert replica.update.staleness.total() == replica.update.updates == pushes - dropped
    replica.close()


def test_accumulate_pushes_every_kth_mean(world: mpidl.World, rng: np.random.Generator) -> None:
    replica = make(world, optim.SGD(1.0), Slope(), accumulate=2)
    x = [drawn(rng) for _ in range(3)]
    if world.rank == RANKS - 1:
        for v, weight in zip(x, (1, 3, 2), strict=True):
            push(replica, v, weight)
        assert replica.steps == 1
        replica.flush()
    replica.synchronize()
    for i, found in enumerate(values(replica)):
        expected = -((x[0][i] + 3 * x[1][i]) / 4 + x[2][i]) / RANKS
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    replica.close()


def test_loaded_parameters_reach_the_servers(world: mpidl.World, rng: np.random.Generator) -> None:
    replica = make(world, optim.SGD(1.0), Slope(), servers=RANKS)
    push(replica, drawn(rng))
    new, x = drawn(rng), drawn(rng)
    replica.load_state_dict({f"p{i}": v for i, v in enumerate(new)})
    if world.rank == RANKS - 1:
        push(replica, x)
    replica.synchronize()
    for found, p, g in zip(values(replica), new, x, strict=True):
        np.testing.assert_allclose(found, p - g / RANKS, rtol=0, atol=1e-12)
    replica.close()


@dataclass
class Breaks:
    """Updates twice, and then raises."""

    error: Exception
    lr: float = 0.1

    def init(self, _param: Any) -> dict[str, Any]:
        return {}

    def update(
        self, param: Any, _grad: Any, _state: Any, step: int, _layers: Any, averages: Any
    ) -> None:
        if step == 2:
            raise self.error
        for part, g in averages:
            param[part] -= self.lr * g


@pytest.mark.parametrize("kind", [InvalidArgument, ZeroDivisionError])
def test_an_error_on_a_server_reaches_every_rank(
    world: mpidl.World, own: np.random.Generator, kind: type[Exception]
) -> None:
    replica = make(world, Breaks(kind("a broken leaf")), servers=RANKS)
    kinds = (InvalidArgument if kind is InvalidArgument else RuntimeError, kind)

    def pushes() -> None:
        for _ in range(4):
            push(replica, drawn(own))

    with pytest.raises(kinds, match="a broken leaf"):
        pushes()
    with pytest.raises(kinds, match="a broken leaf"):  # for good
        replica.update.make(1, 0)
    world.barrier()
    replica.close()


def test_norms_over_parameters_need_one_server(
    world: mpidl.World, rng: np.random.Generator
) -> None:
    x = drawn(rng)
    alone = mpidl.DataParallel(Bowl(), optim.LARS(0.5 / RANKS), "allreduce", world=world.alone())
    alone.model(x).backward()
    alone.step(1)
    replica = make(world, optim.LARS(0.5))
    if world.rank == RANKS - 1:
        push(replica, x)
    replica.synchronize()
    for found, expected in zip(values(replica), values(alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    replica.close()
    alone.close()
    if RANKS > 1:
        replica = make(world, optim.LARS(0.5), servers=2)
        with pytest.raises(InvalidArgument, match=r"norms over whole parameters.*servers=1"):
            push(replica, x)
        world.barrier()
        replica.close()


def test_a_problem_of_one_rank_is_its_own(world: mpidl.World) -> None:
    replica = make(world, optim.SGD(0.1))
    if world.rank == RANKS - 1:
        with pytest.raises(MissingBackward, match="step 0: no gradient") as raised:
            replica.step(3)
        assert not raised.value.collective
    replica.synchronize()
    replica.close()


def test_the_state_is_the_servers(world: mpidl.World, rng: np.random.Generator) -> None:
    replica = make(world, optim.SGD(0.1, momentum=0.9), Slope(), servers=RANKS)
    x = drawn(rng)
    if world.rank == 0:
        push(replica, x)
    replica.synchronize()
    (state,), (flat,) = replica.states, replica.buckets
    whole = np.concatenate(world.gather(state["velocity"]))
    for name, part in flat.slices().items():
        np.testing.assert_array_equal(whole[part], x[int(name[1:])].ravel())
    replica.close()


def test_threads_end_when_all_have_closed_or_forgotten(world: mpidl.World) -> None:
    gc.collect()
    world.barrier()
    for close in (True, False):
        replica = make(world, optim.SGD(0.1), servers=RANKS)
        assert world.size == 1 or threads()
        world.barrier()
        if close:
            replica.close()
        del replica
        gc.collect()
        end = time.monotonic() + 30
        while threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert not threads()
        world.barrier()


def test_what_cannot_be_is_told(world: mpidl.World) -> None:
    for staleness in (-1, 0.5):
        with pytest.raises(InvalidArgument, match=f"staleness={staleness}: expected a whole"):
            ParameterServer(world, asynchronous=True, staleness=staleness)  # type: ignore[arg-type]
    limited = SimpleNamespace(Query_thread=lambda: 1, THREAD_MULTIPLE=3)
    with pytest.raises(InvalidArgument, match="needs MPI_THREAD_MULTIPLE"):
        ParameterServer(replace(world, MPI=limited), asynchronous=True)
    ParameterServer(replace(world, MPI=limited))
    with pytest.raises(InvalidArgument, match=r"clip_norm=1.*use clip_value"):
        make(world, optim.SGD(0.1), clip_norm=1.0)
    with pytest.raises(InvalidArgument, match="local_steps: not with an asynchronous"):
        make(world, optim.SGD(0.1), local_steps=2)
    with pytest.raises(InvalidArgument, match="has no rate `lr`"):
        make(world, SimpleNamespace(update=None, init=None))
