"""Memory that all ranks of a node map: who touches it, when it goes, and where there is none."""

from __future__ import annotations

import errno
import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim, shared
from mpidl.errors import InvalidArgument, NoSharedMemory
from mpidl.strategies import Hierarchical, Sharded, make
from tests.ranks.conftest import DEVICE
from tests.ranks.test_parallel import make_data, make_model, weights_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="host memory is shared, not a GPU's")

MAPPED = "/memfd:mpidl"  # in /proc/PID/maps, and what a descriptor in /proc/PID/fd leads to


def descriptors() -> list[Path]:
    """Return this process's open files of shared memory: each mapping holds one."""
    folder = Path("/proc/self/fd")
    here = [folder / number for number in os.listdir(folder)]  # noqa: PTH208  # it closes its own
    return [path for path in here if path.is_symlink() and str(path.readlink()).startswith(MAPPED)]


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count(MAPPED)


def resident() -> int:
    """Bytes of shared memory that this process has touched."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:  # addresses: a mapping begins
            counts = MAPPED in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def page_bytes() -> int:
    """What is touched at once."""
    chosen = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    small = not chosen.exists() or "[never]" in chosen.read_text()
    return os.sysconf("SC_PAGESIZE") if small else 1 << 21


@pytest.fixture
def no_more(world: mpidl.World) -> Iterator[None]:
    """Nothing of the shared memory that a test takes is left."""
    gc.collect()
    before = mappings(), len(descriptors())
    yield
    gc.collect()
    assert (mappings(), len(descriptors())) == before


def test_parameters_exist_once_and_gradients_on_each_rank(world: mpidl.World) -> None:
    param, grad = Hierarchical(world).allocate(1000, np.dtype("float32"), np)
    world.barrier()
    param[world.rank] = world.rank + 1
    grad.fill(world.rank)
    world.barrier()
    np.testing.assert_array_equal(param[: world.size], np.arange(world.size) + 1)
    assert not param[world.size :].any()
    assert (grad == world.rank).all()
    world.barrier()


def test_a_closed_model_is_this_rank_s_alone(world: mpidl.World, no_more: None) -> None:
    model = make_model("float32", world.rank)
    first = world.broadcast(weights_of(model))
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), "hierarchical")
    replica.close()
    np.testing.assert_array_equal(weights_of(model), first)
    world.barrier()
    for p in model.parameters():
        p.data += world.rank
    world.barrier()
    np.testing.assert_allclose(weights_of(model), first + world.rank, rtol=1e-6)


@pytest.mark.parametrize("closed", [True, False])
def test_memory_goes_with_the_arrays_in_it(
    closed: bool, rng: np.random.Generator, world: mpidl.World, no_more: None
) -> None:
    """Made anew for the same weights again and again; they go on as if it were one training."""
    train, seed = make_data(rng, 23, "float64"), int(rng.integers(1000))
    model, alone, counts = make_model("float64", seed), make_model("float64", seed), set()
    for epoch in range(10):
        replica = mpidl.DataParallel(model, optim.SGD(lr=0.2), "hierarchical", bucket_bytes=200)
        counts.add((mappings(), len(descriptors())))
        for x, y in data.batches(train, 9, world=world, seed=3, epoch=epoch):
            nn.cross_entropy(model(x), y).backward()
            replica.step()
        if closed:
            replica.close()
        del replica
        gc.collect()
        for x, y in data.batches(train, 9, world=None, seed=3, epoch=epoch):
            nn.cross_entropy(alone(x), y).backward()
            for p in alone.parameters():
                p.data -= 0.2 * p.grad
                p.zero_grad()
        np.testing.assert_allclose(weights_of(model), weights_of(alone), rtol=0, atol=1e-11)
    assert len(counts) == 1


def test_views_keep_the_memory(world: mpidl.World) -> None:
    """And nothing else does: neither the strategy that made it, nor other ranks."""
    gc.collect()
    before = mappings()
    strategy = Hierarchical(world)
    param, grad = strategy.allocate(100, np.dtype("float64"), np)
    view = grad[3:5]
    del param, grad
    gc.collect()
    view[:] = world.rank
    assert mappings() == before + 1
    del view
    assert mappings() == before
    strategy.close()


def test_allocation_touches_nothing(world: mpidl.World, no_more: None) -> None:
    """A NUMA node holds what its own ranks write first."""
    gc.collect()
    before = resident()
    made = Hierarchical(world).allocate(1 << 21, np.dtype("float64"), np)
    world.barrier()
    assert resident() == before
    assert sum(path.stat().st_blocks for path in descriptors()) == 0
    world.barrier()
    assert not any(array.any() for array in made)


def test_each_rank_touches_its_own_part_of_the_parameters(world: mpidl.World) -> None:
    size, itemsize = 1 << 22, 4
    model = nn.Linear(1 << 10, 1 << 12, bias=False)
    gc.collect()
    before = resident()
    replica = mpidl.DataParallel(
        model, optim.SGD(lr=0.1, momentum=0.9), "hierarchical", bucket_bytes=1 << 30
    )
    world.barrier()
    part = replica.strategy.owned(size)
    bound = (part.stop - part.start) * itemsize + 2 * page_bytes()
    assert bound - 4 * page_bytes() <= resident() - before <= bound
    whole = sum(path.stat().st_blocks for path in descriptors()) * 512
    assert whole <= size * itemsize + page_bytes()
    world.barrier()
    replica.close()


def without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)


def with_another_file_of_that_number(monkeypatch: pytest.MonkeyPatch) -> None:
    name = shared._name
    monkeypatch.setattr(shared, "_name", lambda file: (*name(file)[:3], 1))


def without_that_process(monkeypatch: pytest.MonkeyPatch) -> None:
    name = shared._name
    monkeypatch.setattr(shared, "_name", lambda file: (1 << 30, *name(file)[1:]))


FAULTS = {  # each on the rank that makes the memory
    without_permission: "^in place of hierarchical: rank 0: memfd_create: .*not permitted$",
    with_another_file_of_that_number: "that number is another process here; let all ranks",
    without_that_process: "cannot map .* No such file or directory; let all ranks of a node run",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("asked", ["hierarchical", "auto"])
def test_what_cannot_be_shared_is_sharded(
    asked: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    world: mpidl.World,
    monkeypatch: pytest.MonkeyPatch,
    no_more: None,
) -> None:
    """With one warning, on rank 0."""
    if asked == "auto" and world.size == 1:
        pytest.skip("one rank shares nothing")
    if world.local_rank == 0:
        fault(monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choice = make(asked, world, 1 << 20)
    assert (type(choice.strategy), choice.name) == (Sharded, "sharded")
    assert re.search(FAULTS[fault], choice.why)
    assert len(set(world.gather(choice.why))) == 1
    assert [str(w.message) for w in said] == [f'strategy "sharded" {choice.why}'] * (not world.rank)
    assert "\n" not in choice.why
    with pytest.raises(NoSharedMemory):
        Hierarchical(world).allocate(10, np.dtype("float32"), np)


def test_there_must_be_enough_for_the_model(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch, no_more: None
) -> None:
    truncate = os.ftruncate

    def limited(file: int, size: int) -> None:
        if size > 1 << 20:
            raise OSError(errno.EFBIG, "File too large")
        truncate(file, size)

    monkeypatch.setattr(os, "ftruncate", limited)
    assert make("hierarchical", world, 1 << 10).name == "hierarchical"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choice = make("hierarchical", world, 1 << 20)
    assert choice.name == "sharded"
    assert "File too large" in choice.why
    assert len(said) == (world.rank == 0)


def test_parameters_are_changed_together(
    rng: np.random.Generator, world: mpidl.World, no_more: None
) -> None:
    """A rank that writes alone would write to all of them."""
    model = make_model("float32", 0)
    replica = mpidl.DataParallel(model, optim.SGD(lr=0.1), "hierarchical")
    state = {k: rng.standard_normal(v.shape) for k, v in model.state_dict().items()}
    for p in model.parameters():
        with pytest.raises(ValueError, match="read-only"):
            p.data *= 0.5
    with pytest.raises(InvalidArgument, match=r"use DataParallel\.load_state_dict"):
        model.load_state_dict(state)
    with pytest.raises(InvalidArgument, match="is missing"):
        replica.load_state_dict({} if world.rank == world.size - 1 else state)
    for _ in range(2):
        replica.load_state_dict(state)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, state[name].astype(np.float32))
        model(np.ones((2, 5), np.float32)).sum().backward()
        replica.step()
    with pytest.raises(ValueError, match="read-only"):
        next(iter(model.parameters())).data[...] = 0
    replica.close()
    next(iter(model.parameters())).data[...] = 0
    with pytest.raises(InvalidArgument, match="was closed"):
        replica.step(0)


def test_one_rank_that_cannot_map_it_is_enough(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch, no_more: None
) -> None:
    """Also where this comes late, in an allocation that follows others."""

    def full(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    strategy, last = Hierarchical(world), world.size - 1
    made = strategy.allocate(100, np.dtype("float32"), np)
    with monkeypatch.context() as patch:
        if world.rank == last:
            patch.setattr(shared, "_open", full)
        with pytest.raises(NoSharedMemory, match=rf"rank {last}: .* Too many open files"):
            strategy.allocate(100, np.dtype("float32"), np)
    made[1].fill(world.rank)
    mean = np.concatenate([mean for _, mean in strategy.reduce(made[1], 1.0)] or [made[1][:0]])
    np.testing.assert_array_equal(mean, sum(range(world.size)))


def test_a_python_without_the_function(
    world: mpidl.World, own: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of one that was built for an old C library: ranks average, one way or the other."""
    monkeypatch.delattr(os, "memfd_create")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = make("hierarchical", world)
    assert choice.name in ("hierarchical", "sharded")
    _, grad = choice.strategy.allocate(100, np.dtype("float64"), np)
    grad[:] = own.standard_normal(100)
    expected = sum(world.gather(grad)) / world.size
    for part, mean in choice.strategy.reduce(grad, 1 / world.size):
        np.testing.assert_allclose(mean, expected[part], rtol=0, atol=1e-12)
    choice.strategy.share(grad)
