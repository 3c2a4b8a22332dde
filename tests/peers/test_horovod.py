"""The strategy `horovod`; its tests need Horovod, which tests/peers/install_horovod.sh installs."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn, optim
from mpidl.bench import rivals
from mpidl.errors import InvalidArgument, MPINotFound
from mpidl.strategies import LIBRARIES, STRATEGIES, horovod, make, own
from tests.ranks.conftest import as_nodes

MISSING = horovod.missing()
with_horovod = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
STEPS, BATCH = 20, 24


def train(world: mpidl.World, strategy: str, seed: int, **options: Any) -> list[np.ndarray]:
    """Return the parameters after some steps on parts of unequal size."""
    nn.seed(seed)
    model = nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 4))
    replica = mpidl.DataParallel(
        model, optim.SGD(lr=0.1, momentum=0.9), strategy, world=world, **options
    )
    rng = np.random.default_rng(seed)
    cuts = [BATCH * r * r // world.size**2 for r in range(world.size + 1)]
    for _ in range(STEPS):
        x = rng.standard_normal((BATCH, 9)).astype(np.float32)
        y = rng.integers(4, size=BATCH)
        mine = slice(cuts[world.rank], cuts[world.rank + 1])
        loss = nn.cross_entropy(model(mpidl.tensor(x[mine])), y[mine])
        loss.backward()
        replica.step(weight=mine.stop - mine.start)
    replica.synchronize()
    found = [parameter.data.copy() for parameter in model.parameters()]
    replica.close()
    return found


@with_horovod
@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 300}, {"overlap": True}])
def test_all_strategies_train_alike(
    options: dict[str, Any], world: mpidl.World, rng: np.random.Generator
) -> None:
    seed = int(rng.integers(2**31))
    found = train(world, "horovod", seed, **options)
    for name in own():
        expected = train(world, name, seed)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


@with_horovod
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 100_003])
def test_it_yields_the_weighted_mean(
    size: int, dtype: type, world: mpidl.World, own: np.random.Generator
) -> None:
    strategy = STRATEGIES["horovod"](world)
    param, grad = strategy.allocate(size, np.dtype(dtype), np)
    assert (param.size, grad.size, strategy.owned(size)) == (size, size, slice(0, size))
    ranks = np.arange(1, world.size + 1)
    for _ in range(3):
        grad[:] = own.standard_normal(size)
        expected = world.sum(grad * (ranks / ranks.sum())[world.rank])
        ((part, mean),) = strategy.reduce(grad, float((ranks / ranks.sum())[world.rank]))
        assert part == slice(0, size)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
        strategy.share(param)
    strategy.close()


@with_horovod
def test_horovod_runs_as_long_as_somebody_needs_it(world: mpidl.World) -> None:
    hvd = importlib.import_module("horovod.torch")
    assert not hvd.is_initialized()
    first, second = (make("horovod", world).strategy for _ in range(2))
    first.close()
    first.close()
    assert hvd.is_initialized()
    _, grad = second.allocate(5, np.float32, np)
    grad[:] = world.rank
    ((_, mean),) = second.reduce(grad, 1 / world.size)
    np.testing.assert_allclose(mean, (world.size - 1) / 2, rtol=1e-6)
    second.close()
    assert not hvd.is_initialized()
    hvd.init()  # the program's own stays
    make("horovod", world).strategy.close()
    assert hvd.is_initialized()
    hvd.shutdown()


@with_horovod
def test_other_ranks_than_those_of_horovod(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hvd = importlib.import_module("horovod.torch")
    if world.size > 1:
        with pytest.raises(InvalidArgument, match=f"of all {world.size} ranks, not of 1"):
            make("horovod", world.alone())
    last = world.rank == world.size - 1
    monkeypatch.setattr(hvd, "size", lambda: world.size + last)
    said = f"horovod sees {world.size + 1} ranks of {world.size}"
    with pytest.raises(InvalidArgument, match=said):
        make("horovod", world)
    assert not hvd.is_initialized()
    monkeypatch.undo()
    monkeypatch.setattr(hvd, "rank", lambda: world.rank + 1)
    with pytest.raises(InvalidArgument, match="has number 1 for rank 0"):
        make("horovod", world)
    monkeypatch.undo()
    assert rivals.try_horovod(world) is None


@with_horovod
def test_an_mpi_of_another_kind(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ["/a/libmpi.so.40", "/b/libmpi.so.12"]
    found = libraries if world.rank == 0 else libraries[:1]
    monkeypatch.setattr(horovod, "_mpi_libraries", lambda: found)
    said = "rank.*built for another MPI: /a/libmpi.so.40 and /b/libmpi.so.12 are loaded"
    with pytest.raises(MPINotFound, match=said):
        make("horovod", world)
    monkeypatch.undo()
    assert len(horovod._mpi_libraries()) == 1


def test_on_a_gpu(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod, "_start", lambda _: (None, False))
    monkeypatch.setattr(horovod.importlib, "import_module", lambda _: None)
    strategy = horovod.Horovod(world)
    with pytest.raises(InvalidArgument, match="the model is on the GPU"):
        strategy.allocate(3, np.float32, None)


def test_where_a_rank_lacks_horovod(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank says so, and none waits in Horovod for the others."""
    last = world.size - 1
    if world.rank == last:
        monkeypatch.setattr(horovod, "find_spec", lambda _: None)
    with pytest.raises(MPINotFound, match=r"horovod is not installed; expected .* pip install"):
        make("horovod", world)
    reason = "is not installed" if MISSING is None else MISSING
    with pytest.raises(MPINotFound, match=f"rank.*{reason}"):
        mpidl.DataParallel(nn.Linear(2, 3), optim.SGD(lr=0.1), "horovod")


def test_it_is_never_chosen_unasked(world: mpidl.World) -> None:
    assert set(STRATEGIES) - set(own()) == set(LIBRARIES) == {"horovod", "nccl"}
    for where in (world, as_nodes(world, lambda rank: rank)):
        for size in (0, 1 << 30):
            choice = make("auto", where, size)
            assert choice.name in own()
            choice.strategy.close()
