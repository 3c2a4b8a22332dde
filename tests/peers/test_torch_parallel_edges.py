"""`mpidl.torch.DataParallel` where programs do what few do."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

import mpidl  # noqa: E402
from mpidl.errors import InvalidArgument  # noqa: E402
from mpidl.torch.parallel import DataParallel  # noqa: E402
from tests.peers.test_torch_parallel import (  # noqa: E402
    BATCH,
    MODELS,
    OPTIMIZERS,
    assert_equal,
    assert_same_state,
    loss_of,
    mine,
    mlp,
    seeded,
)

OPTIMIZERS["plain"] = lambda p: torch.optim.SGD(p, 0.1)
several = pytest.mark.skipif(mpidl.init().size == 1, reason="one rank owns everything")


class Pair:
    """The same on one process and in parallel."""

    def __init__(self, world: mpidl.World, make: Any, optimizer: str = "adam", **options: Any):
        self.world = world
        self.plain, self.module = seeded(make), seeded(make)
        self.updates = [OPTIMIZERS[optimizer](m.parameters()) for m in (self.plain, self.module)]
        options = {"strategy": "hierarchical", **options}
        self.parallel = DataParallel(self.module, self.updates[1], **options)

    def step(self, rng: np.random.Generator, update: bool = True) -> None:
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        w = self.world
        pairs = [(self.plain, torch.from_numpy(x), torch.from_numpy(y))]
        pairs.append((self.parallel, mine(w, x), mine(w, y)))
        for u, (m, a, b) in zip(self.updates, pairs, strict=True):
            u.zero_grad()
            loss_of(m(a), b).backward()
            if update:
                u.step()

    def check(self) -> None:
        assert_equal(self.parallel, self.plain)
        self.parallel.gather_optimizer_state()
        assert_same_state(self.updates[1].state_dict(), self.updates[0].state_dict())


def test_looking_into_the_state_changes_nothing(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp)
    for _ in range(3):
        pair.step(rng)
        for p in pair.module.parameters():
            pair.updates[1].state[p].get("exp_avg")
    pair.check()


def test_an_empty_state_is_loaded_too(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp)
    start = [copy.deepcopy(u.state_dict()) for u in pair.updates]
    for _ in range(2):
        pair.step(rng)
    for u, state in zip(pair.updates, start, strict=True):
        u.load_state_dict(state)
    pair.step(rng)
    pair.check()
    kept = copy.deepcopy(pair.updates[0].state_dict())
    pair.step(rng)
    pair.updates[1].load_state_dict(kept)
    pair.parallel.close()
    assert_same_state(pair.updates[1].state_dict(), kept)


@several
def test_an_optimizer_has_one_at_a_time(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp)
    pair.step(rng)
    with pytest.raises(InvalidArgument, match="has a DataParallel already"):
        DataParallel(pair.module, pair.updates[1], "hierarchical")
    pair.parallel.close()
    pair.parallel = DataParallel(pair.module, pair.updates[1], "sharded")
    pair.step(rng)
    pair.check()


def test_state_that_appears_later(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp, "plain")
    pair.step(rng)
    for u in pair.updates:
        u.param_groups[0]["momentum"] = 0.9
    for _ in range(3):
        pair.step(rng)
    assert_equal(pair.parallel, pair.plain)
    if world.size > 1:
        mistakes = []
        try:
            pair.updates[1].state_dict()
        except InvalidArgument as error:
            mistakes.append(str(error))
        assert any("momentum_buffer" in text for text in world.gather(str(mistakes)))


@several
def test_numbers_that_are_no_tensors(world: mpidl.World) -> None:
    class Counts(torch.optim.Optimizer):  # type: ignore[misc]
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1

    module = mlp()
    with pytest.raises(InvalidArgument, match=r"step.*no tensor.*by_element=False"):
        DataParallel(module, Counts(module.parameters()), "sharded", by_element=True)


@pytest.mark.parametrize("strategy", ["allreduce", "hierarchical", "sharded"])
def test_join_updates_by_itself(strategy: str, world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp, "sgd", strategy=strategy)
    data = [(rng.standard_normal((4, 20)).astype(np.float32), rng.integers(0, 11, 4))
            for _ in range(world.size + 1)]  # fmt: skip
    with pair.parallel.join():
        for x, y in data[: world.rank + 2]:
            pair.updates[1].zero_grad()
            loss_of(pair.parallel(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            pair.updates[1].step()
    for x, y in data:
        pair.updates[0].zero_grad()
        loss_of(pair.plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        pair.updates[0].step()
    assert_equal(pair.parallel, pair.plain)


def test_overlap_where_a_rank_has_no_rows(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp, "sgd", overlap=True, bucket_bytes=500)
    for step in range(12):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        for u in pair.updates:
            u.zero_grad()
        loss_of(pair.plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        here = step % world.size == world.rank
        x, y = (x, y) if here else (x[:0], y[:0])
        loss_of(pair.parallel(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        for u in pair.updates:
            u.step()
    assert_equal(pair.parallel, pair.plain)
    pair.parallel.close()


def test_half_gradients_of_passes_without_averaging(world: mpidl.World) -> None:
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    parallel = DataParallel(layer)
    with parallel.no_sync():
        parallel(torch.full((2, 4), float(world.rank), dtype=torch.bfloat16)).sum().backward()
    parallel.average_gradients(2)
    mean = 2 * (world.size - 1) / 2
    assert torch.equal(layer.weight.grad, torch.full((3, 4), mean, dtype=torch.bfloat16))


def test_half_convolutions_with_channels_last(world: mpidl.World) -> None:
    layer = torch.nn.Conv2d(3, 4, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.ones(2, 3, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(layer)
    expected(x).sum().backward()
    parallel = DataParallel(layer)
    expected.load_state_dict(layer.state_dict())
    parallel(x).sum().backward()
    assert torch.equal(layer.weight.grad, expected.weight.grad)


def test_several_backward_passes_of_uneven_parts(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp, "sgd")
    x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
    for u, m, a, b in zip(
        pair.updates, (pair.plain, pair.parallel),
        (torch.from_numpy(x), mine(world, x)), (torch.from_numpy(y), mine(world, y)),
        strict=True,
    ):  # fmt: skip
        u.zero_grad()
        first, second = loss_of(m(a), b), loss_of(2 * m(a), b)
        first.backward()
        second.backward()
        u.step()
    assert_equal(pair.parallel, pair.plain)


def test_a_penalty_on_gradients_averages_nothing(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp, "sgd")
    x = rng.standard_normal((12, 20)).astype(np.float32)
    for u, m, a in zip(
        pair.updates, (pair.plain, pair.parallel), (torch.from_numpy(x), mine(world, x)),
        strict=True,
    ):  # fmt: skip
        u.zero_grad()
        m_no_sync = pair.parallel.no_sync() if m is pair.parallel else torch.enable_grad()
        with m_no_sync:
            m(a).square().mean().backward()
        a.requires_grad_()
        out = m(a).square().sum(1).mean()
        (slope,) = torch.autograd.grad(m(a).sum(), a, create_graph=True)
        (out + slope.square().sum(1).mean()).backward()
        u.step()
    assert_equal(pair.parallel, pair.plain)


def test_a_graph_of_gradients(world: mpidl.World, rng: Any) -> None:
    layer = seeded(mlp)
    parallel = DataParallel(layer)
    with pytest.warns(UserWarning, match="create_graph=True"):
        parallel(torch.ones(2, 20)).square().mean().backward(create_graph=True)
    for p in layer.parameters():
        p.grad = p.grad.detach()
    torch.optim.SGD(layer.parameters(), 0.1).zero_grad(set_to_none=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_large_layer_used_again_in_a_checkpoint(
    reentrant: bool, world: mpidl.World, rng: Any
) -> None:
    from torch.utils.checkpoint import checkpoint

    class Again(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(800, 800)

        def forward(self, x: Any) -> Any:
            h = self.layer(x)
            return self.layer(checkpoint(self.layer, h, use_reentrant=reentrant)).square().mean()

    plain, module = seeded(Again), seeded(Again)
    parallel = DataParallel(module, strategy="hierarchical")
    x = torch.from_numpy(rng.standard_normal((6, 800)).astype(np.float32))
    plain(x).backward()
    parallel(x).backward()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=0, atol=1e-6)


def test_statistics_of_two_forwards_before_backward(world: mpidl.World, rng: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.BatchNorm1d(8))
    parallel = DataParallel(module)
    x = torch.from_numpy(rng.standard_normal((2, 6, 20)).astype(np.float32))
    losses = [parallel(part).square().mean() for part in x]
    for loss in losses:
        loss.backward()


def test_pickled_and_freed(world: mpidl.World, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(800, 800), torch.nn.Linear(800, 2))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    parallel = DataParallel(module, optimizer)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again[0].weight, module[0].weight)
    pickle.loads(pickle.dumps(module.state_dict()))
    with pytest.raises(InvalidArgument, match="copy its `module`"):
        copy.deepcopy(parallel)
    world.barrier()
    weight = weakref.ref(module[0].weight)
    del parallel, optimizer, module
    gc.collect()
    assert weight() is None


def test_no_elements(world: mpidl.World, rng: Any) -> None:
    module = torch.nn.ParameterList([torch.zeros(0, 3), torch.ones(2, 3)])
    optimizer = torch.optim.Adam(module.parameters())
    holder = torch.nn.Module()
    holder.items = module
    parallel = DataParallel(holder, optimizer, "hierarchical")
    (module[0].sum() + module[1].sum()).backward()
    parallel.average_gradients(1)
    optimizer.step()


def test_within_another_module(world: mpidl.World, rng: Any) -> None:
    outer = torch.nn.ModuleDict({"inner": DataParallel(seeded(mlp))})
    state = copy.deepcopy(outer.state_dict())
    assert set(state) == {f"inner.{name}" for name in mlp().state_dict()}
    for p in outer.parameters():
        p.data.zero_()
    outer.load_state_dict(state)
    assert_equal(outer["inner"], seeded(mlp))


def test_writing_once(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp)
    pair.step(rng)
    with pair.parallel.writing() as here, torch.no_grad():
        for p in pair.module.parameters() if here else ():
            p.mul_(0.5)
    with torch.no_grad():
        for p in pair.plain.parameters():
            p.mul_(0.5)
    pair.step(rng)
    pair.check()


@several
def test_a_stale_graph_is_noticed(world: mpidl.World, rng: Any) -> None:
    pair = Pair(world, mlp)
    loss = loss_of(pair.parallel(torch.ones(2, 20)), torch.zeros(2, dtype=torch.long))
    loss.backward(retain_graph=True)
    pair.updates[1].step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    world.barrier()


def test_batch_norm_over_all_ranks(world: mpidl.World, rng: Any) -> None:
    """Like one process with the whole batch, running statistics too: for parts of equal size."""
    import mpidl.torch as hvd

    def convolutions(norm: Any) -> Any:
        layers = [torch.nn.Conv2d(3, 4, 3), norm(4), torch.nn.ReLU(), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(64, 11))

    hvd.init()
    plain = seeded(lambda: convolutions(torch.nn.BatchNorm2d))
    module = seeded(lambda: convolutions(hvd.SyncBatchNorm))
    updates = [OPTIMIZERS["sgd"](m.parameters()) for m in (plain, module)]
    parallel = DataParallel(module, updates[1])
    for _ in range(20):
        x, y = rng.standard_normal((12, 3, 6, 6)).astype(np.float32), rng.integers(0, 11, 12)
        pairs = [(plain, torch.from_numpy(x), torch.from_numpy(y))]
        pairs.append((parallel, mine(world, x), mine(world, y)))
        for u, (m, a, b) in zip(updates, pairs, strict=True):
            u.zero_grad()
            loss_of(m(a), b).backward()
            u.step()
    assert_equal(parallel, plain, 1e-4)


def test_two_ranks_with_their_modules_on_one_gpu(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of GPUs is made up."""
    from types import SimpleNamespace

    from mpidl.torch import places

    monkeypatch.setenv("MPIDL_OVERSUBSCRIBE", "0")
    on_gpu = {"w": SimpleNamespace(is_cuda=True, device="cuda:0")}
    for uuid, told in (("GPU-1", True), (f"GPU-{world.rank}", False), (None, False)):
        found = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            places.check_gpus(world, on_gpu)
        assert len(caught) == (told and world.local_rank == 0 and world.local_size > 1)
