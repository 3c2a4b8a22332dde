"""`mpidl.torch.DataParallel` against one process that has the whole global batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

import mpidl  # noqa: E402
from mpidl.errors import InvalidArgument, MpidlError, RankMismatch, UnknownStrategy  # noqa: E402
from mpidl.torch.parallel import DataParallel  # noqa: E402
from tests.conftest import ALL  # noqa: E402
from tests.ranks.conftest import PLACEMENTS, STRATEGIES, as_nodes  # noqa: E402

STEPS, BATCH = 20, 13  # odd, so that parts are unequal
torch.set_num_threads(1)


class Words(torch.nn.Module):  # type: ignore[misc]
    """A transformer whose input and output share one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(11, 16)
        self.block = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = torch.nn.Linear(16, 11, bias=False)
        self.head.weight = self.letters.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.block(self.letters(ids)).mean(1))


class Recurrent(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(6, 9, batch_first=True), torch.nn.Linear(9, 11)

    def forward(self, x: Any) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


class Choosy(torch.nn.Module):  # type: ignore[misc]
    """Uses some of its layers only when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(20, 16), torch.nn.Linear(20, 16)
        self.never, self.head = torch.nn.Linear(20, 16), torch.nn.Linear(16, 11)

    def forward(self, x: Any, second: bool = False) -> Any:
        h = self.first(x)
        if second:
            h = h + self.second(x)
        return self.head(torch.relu(h))


def mlp() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 11))


def cnn() -> Any:
    """Its norm has fixed statistics: those of a rank's part are not those of the whole batch."""
    norm = torch.nn.BatchNorm2d(4)

    def fix(module: Any, _: Any) -> None:
        module.eval()

    norm.register_forward_pre_hook(fix)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), norm, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 11)
    )


MODELS: dict[str, tuple[Callable[[], Any], Callable[[np.random.Generator], Any]]] = {
    "mlp": (mlp, lambda g: g.standard_normal((BATCH, 20)).astype(np.float32)),
    "cnn": (cnn, lambda g: g.standard_normal((BATCH, 3, 6, 6)).astype(np.float32)),
    "words": (Words, lambda g: g.integers(0, 11, (BATCH, 5))),
    "lstm": (Recurrent, lambda g: g.standard_normal((BATCH, 4, 6)).astype(np.float32)),
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def mine(world: mpidl.World, batch: Any) -> Any:
    """Return this rank's part of a global batch."""
    first, last = (len(batch) * r // world.size for r in (world.rank, world.rank + 1))
    return torch.from_numpy(np.ascontiguousarray(batch[first:last]))


def loss_of(outputs: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(outputs, labels)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def assert_equal(module: Any, expected: Any, atol: float = 1e-5) -> None:
    state = expected.state_dict()
    found = module.state_dict()
    assert list(found) == list(state)
    for name, value in state.items():
        np.testing.assert_allclose(
            found[name].detach().numpy(), value.detach().numpy(), rtol=0, atol=atol, err_msg=name
        )


def train(
    world: mpidl.World,
    rng: np.random.Generator,
    model: str,
    optimizer: str,
    steps: int = STEPS,
    owns: bool = True,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """Train the same on all ranks and on one process; return both, module and optimizer."""
    make, inputs = MODELS[model]
    plain, module = seeded(make), seeded(make, 0 if world.rank == 0 else 1)
    reference, mean = OPTIMIZERS[optimizer](plain.parameters()), None
    mean = OPTIMIZERS[optimizer](module.parameters())
    parallel = DataParallel(module, mean if owns else None, world=world, **options)
    for _ in range(steps):
        x, y = inputs(rng), rng.integers(0, 11, BATCH)
        reference.zero_grad()
        loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        mean.zero_grad()
        loss_of(parallel(mine(world, x)), mine(world, y)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        mean.step()
    return parallel, mean, plain, reference


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_like_one_process(model: str, strategy: str, world: mpidl.World, rng: Any) -> None:
    parallel, _, plain, _ = train(world, rng, model, "sgd", strategy=strategy)
    assert_equal(parallel, plain)
    parallel.close()
    assert_equal(parallel.module, plain)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["hierarchical", "sharded"])
def test_each_optimizer(optimizer: str, strategy: str, world: mpidl.World, rng: Any) -> None:
    parallel, mean, plain, reference = train(world, rng, "mlp", optimizer, 6, strategy=strategy)
    assert_equal(parallel, plain)
    parallel.gather_optimizer_state()
    assert_same_state(mean.state_dict(), reference.state_dict())
    parallel.close()
    assert_same_state(mean.state_dict(), reference.state_dict())


def assert_same_state(found: Any, expected: Any) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, values in expected["state"].items():
        assert found["state"][number].keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_allclose(found["state"][number][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_an_optimizer(strategy: str, world: mpidl.World, rng: Any) -> None:
    parallel, _, plain, _ = train(world, rng, "mlp", "adam", 6, owns=False, strategy=strategy)
    assert_equal(parallel, plain)
    grads = [p.grad.numpy().tobytes() for p in parallel.module.parameters()]
    assert len(set(world.gather(tuple(grads)))) == 1


def test_state_goes_on_after_loading(world: mpidl.World, rng: Any) -> None:
    parallel, mean, plain, reference = train(world, rng, "mlp", "adam", 3, strategy="hierarchical")
    kept = copy.deepcopy((parallel.state_dict(), mean.state_dict()))
    again = seeded(mlp, 5)
    optimizer = OPTIMIZERS["adam"](again.parameters())
    optimizer.load_state_dict(kept[1])  # before it is made parallel
    other = DataParallel(again, optimizer, "hierarchical")
    other.load_state_dict(kept[0])
    for _ in range(3):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        for module, update in ((other, optimizer), (parallel, mean)):
            update.zero_grad()
            loss_of(module(mine(world, x)), mine(world, y)).backward()
            update.step()
        reference.zero_grad()
        loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        reference.step()
    assert_equal(other, plain)
    assert_equal(parallel, plain)
    parallel.load_state_dict(kept[0])
    mean.load_state_dict(kept[1])  # after
    assert_same_state(mean.state_dict(), kept[1])


def test_groups_schedules_and_scaled_losses(world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp)

    def parts(m: Any) -> list[dict[str, Any]]:
        return [{"params": m[0].parameters(), "lr": 0.2}, {"params": m[2].parameters()}]

    updates = [torch.optim.SGD(parts(m), 0.05, momentum=0.9) for m in (plain, module)]
    schedules = [torch.optim.lr_scheduler.StepLR(u, 2, 0.5) for u in updates]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) for _ in updates]
    parallel = DataParallel(module, updates[1], "hierarchical")
    for step in range(8):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        parts_of = [(plain, torch.from_numpy(x), torch.from_numpy(y))]
        parts_of.append((parallel, mine(world, x), mine(world, y)))
        for i, (m, a, b) in enumerate(parts_of):
            updates[i].zero_grad(set_to_none=bool(step % 2))
            loss = loss_of(m(a), b)
            if step == 4:
                loss = loss * torch.inf  # a step that is left out
            scalers[i].scale(loss).backward()
            scalers[i].unscale_(updates[i])
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scalers[i].step(updates[i])
            scalers[i].update()
            schedules[i].step()
    assert_equal(parallel, plain)
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_accumulation(world: mpidl.World, rng: Any) -> None:
    """Passes in `no_sync` add up; several forwards may come before a backward."""
    plain, module = seeded(mlp), seeded(mlp)
    updates = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], "hierarchical")
    for _ in range(4):
        batches = [(MODELS["mlp"][1](rng)[:12], rng.integers(0, 11, 12)) for _ in range(4)]
        for u in updates:
            u.zero_grad()
        for x, y in batches:
            loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        with parallel.no_sync():
            with parallel.no_sync():  # one within does not end it
                pass
            for x, y in batches[:2]:
                loss_of(parallel(mine(world, x)), mine(world, y)).backward()
                assert parallel._gradients.pending  # nothing was averaged
        losses = [loss_of(parallel(mine(world, x)), mine(world, y)) for x, y in batches[2:]]
        sum(losses).backward()
        for u in updates:
            u.step()
    assert_equal(parallel, plain)  # 12 samples: as many on each rank


def test_parameters_that_are_not_always_used(world: mpidl.World, rng: Any) -> None:
    """One that no rank used is left alone, as on one process: no decay, no momentum."""
    plain, module = seeded(Choosy), seeded(Choosy)
    updates = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for m in (plain, module)
    ]
    parallel = DataParallel(module, updates[1], "hierarchical")
    for step in range(6):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        for u in updates:
            u.zero_grad()
        lengths = [BATCH * (r + 1) // world.size - BATCH * r // world.size
                   for r in range(world.size)]  # fmt: skip
        parts = list(zip(torch.from_numpy(x).split(lengths), torch.from_numpy(y).split(lengths),
                         strict=True))  # fmt: skip
        used = [bool(step % 3 == 1 and rank == 0) for rank in range(world.size)]
        total = sum(
            loss_of(plain(a, use), b) * len(b) for (a, b), use in zip(parts, used, strict=True)
        )
        (total / BATCH).backward()
        a, b = parts[world.rank]
        loss_of(parallel(a, used[world.rank]), b).backward()
        assert module.never.weight.grad is None
        assert (module.second.weight.grad is None) == (plain.second.weight.grad is None)
        for u in updates:
            u.step()
    assert_equal(parallel, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool, world: mpidl.World, rng: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Stored(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(20, 20) for _ in range(3))
            self.head = torch.nn.Linear(20, 11)

        def forward(self, x: Any) -> Any:
            for layer in (*self.layers, self.layers[0]):  # one of them twice
                x = torch.tanh(checkpoint(layer, x, use_reentrant=reentrant))
            return self.head(x)

    plain, module = seeded(Stored), seeded(Stored)
    updates = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], "hierarchical")
    for _ in range(3):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        pairs = [(plain, torch.from_numpy(x), torch.from_numpy(y))]
        pairs.append((parallel, mine(world, x), mine(world, y)))
        for i, (m, a, b) in enumerate(pairs):
            updates[i].zero_grad()
            loss_of(m(a.requires_grad_()), b).backward()
            updates[i].step()
    assert_equal(parallel, plain)


@pytest.mark.skipif(mpidl.init().size > 2 and not ALL, reason="compiling takes long")
@pytest.mark.parametrize("outside", [False, True])
def test_compiled(outside: bool, world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp)
    updates = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, module)]
    inner = module if outside else torch.compile(module, backend="aot_eager", dynamic=True)
    parallel = DataParallel(inner, updates[1], "hierarchical")
    called = torch.compile(parallel, backend="aot_eager", dynamic=True) if outside else parallel
    for _ in range(4):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        pairs = [(plain, torch.from_numpy(x), torch.from_numpy(y))]
        pairs.append((called, mine(world, x), mine(world, y)))
        for i, (m, a, b) in enumerate(pairs):
            updates[i].zero_grad()
            loss_of(m(a), b).backward()
            updates[i].step()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("strategy", ["hierarchical", "allreduce", "sharded"])
def test_other_dtypes(dtype: Any, strategy: str, world: mpidl.World, rng: Any) -> None:
    if world.size > 1 and 12 % world.size:
        return
    plain, module = (seeded(lambda: torch.nn.Linear(20, 11, dtype=dtype)) for _ in range(2))
    updates = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.5) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], strategy)
    for _ in range(3):
        x = torch.from_numpy(rng.standard_normal((12, 20))).to(dtype)
        n = 12 // world.size
        for i, (m, a) in enumerate(
            ((plain, x), (parallel, x[n * world.rank : n * (world.rank + 1)]))
        ):
            updates[i].zero_grad()
            m(a).abs().mean().backward()
            updates[i].step()
    tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert a.dtype == dtype
        assert float((a - b).detach().abs().max()) < tolerance
    values = [p.detach().view(torch.uint8).numpy().tobytes() for p in module.parameters()]
    assert len(set(world.gather(tuple(values)))) == 1


def test_ranks_without_samples(world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp)
    updates = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, module)]
    parallel = DataParallel(module, updates[1])
    for step in range(6):
        x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
        for u in updates:
            u.zero_grad()
        loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        one = step % world.size  # has all of them
        x, y = (x, y) if one == world.rank else (x[:0], y[:0])
        if one != world.rank and step % 2:
            parallel.average_gradients(0)
        else:
            loss_of(parallel(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        for u in updates:
            u.step()
    assert_equal(parallel, plain)


@pytest.mark.parametrize("owns", [True, False])
def test_uneven_numbers_of_steps(owns: bool, world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp, world.rank)
    updates = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, module)]
    parallel = DataParallel(module, updates[1] if owns else None)
    data = [(rng.standard_normal((4, 20)).astype(np.float32), rng.integers(0, 11, 4))
            for _ in range(world.size + 1)]  # fmt: skip

    def clipped(m: Any, update: Any) -> None:
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        update.step()

    with parallel.join(lambda: clipped(module, updates[1])):
        for x, y in data[: world.rank + 2]:
            updates[1].zero_grad()
            loss_of(parallel(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            clipped(module, updates[1])
    for x, y in data:  # those who go on have the same batch
        updates[0].zero_grad()
        loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        clipped(plain, updates[0])
    assert_equal(parallel, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_overlap_between_nodes(placement: str, world: mpidl.World, rng: Any) -> None:
    if world.size == 1:
        return
    nodes = as_nodes(world, PLACEMENTS[placement])
    parallel, _, plain, _ = train(
        nodes, rng, "words", "sgd", 14, strategy="hierarchical", overlap=True
    )
    assert parallel._gradients.overlap.active
    assert_equal(parallel, plain)
    parallel.close()


def test_overlap_with_unused_parameters_and_passes_without_averaging(
    world: mpidl.World, rng: Any
) -> None:
    plain, module = seeded(Choosy), seeded(Choosy)
    updates = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], "hierarchical", overlap=True)
    for _ in range(12):
        x = rng.standard_normal((2, 12, 20)).astype(np.float32)
        y = rng.integers(0, 11, (2, 12))
        for u in updates:
            u.zero_grad()
        for a, b in zip(x, y, strict=True):
            loss_of(plain(torch.from_numpy(a)), torch.from_numpy(b)).backward()
        with parallel.no_sync():
            loss_of(parallel(mine(world, x[0])), mine(world, y[0])).backward()
        loss_of(parallel(mine(world, x[1])), mine(world, y[1])).backward()
        for u in updates:
            u.step()
    assert parallel._gradients.overlap.active
    if 12 % world.size == 0:
        assert_equal(parallel, plain)
    parallel.close()


def test_buffers_are_rank_0s(world: mpidl.World, own: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.BatchNorm1d(8))
    parallel = DataParallel(module)
    parallel(torch.from_numpy(own.standard_normal((5, 20)).astype(np.float32))).sum().backward()
    kept = [b.numpy().tobytes() for b in module.buffers()]
    assert len(set(world.gather(tuple(kept)))) == 1
    assert module[1].num_batches_tracked == 1


def test_large_gradients_are_computed_in_their_buckets(world: mpidl.World, rng: Any) -> None:
    """Those of linear layers; twice used ones, retained graphs and plain gradients too."""

    def large() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(700, 800), torch.nn.Linear(800, 3))

    plain, module = seeded(large), seeded(large)
    updates = [torch.optim.SGD(m.parameters(), 0.01) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], "hierarchical")
    assert isinstance(module[0], torch.nn.Linear)
    for step in range(6):
        x = torch.from_numpy(rng.standard_normal((12, 700)).astype(np.float32))
        n = 12 // world.size
        for i, (m, a) in enumerate(
            ((plain, x), (parallel, x[n * world.rank : n * (world.rank + 1)]))
        ):
            updates[i].zero_grad()
            loss = m(a).square().mean()
            if step == 1:
                loss = loss + m(a).abs().mean()
            if step == 2:
                weight = m.parameters().__next__()
                (direct,) = torch.autograd.grad(loss, weight, retain_graph=True)
                before = direct.clone()
                loss.backward()
                assert torch.equal(direct, before)
            elif step == 3:
                (direct,) = torch.autograd.grad(loss, next(m.parameters()), create_graph=True)
                (loss + direct.square().sum()).backward()
            elif step == 4:
                loss.backward(retain_graph=True)
                loss.backward()
            else:
                loss.backward()
            updates[i].step()
        if world.size == 1 or (step not in (3, 4) and 12 % world.size == 0):
            assert_equal(parallel, plain, 1e-4)
        elif step in (3, 4):
            plain.load_state_dict(parallel.state_dict())
    twin = copy.deepcopy(module)
    twin(x).sum().backward()
    assert twin[0].weight.grad.data_ptr() != module[0].weight.grad.data_ptr()
    parallel.close()
    assert type(module[0]) is torch.nn.Linear


def test_an_optimizer_that_looks_at_whole_parameters(world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp)
    updates = [torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3) for m in (plain, module)]
    parallel = DataParallel(module, updates[1])
    x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
    pairs = [(plain, torch.from_numpy(x), torch.from_numpy(y))]
    pairs.append((parallel, mine(world, x), mine(world, y)))
    for i, (m, a, b) in enumerate(pairs):

        def closure(i: int = i, m: Any = m, a: Any = a, b: Any = b) -> Any:
            updates[i].zero_grad()
            loss = loss_of(m(a), b)
            loss.backward()
            whole = world.sum([loss.item() * len(a)])[0] / BATCH if i else loss.item()
            return torch.tensor(whole)

        for _ in range(2):
            updates[i].step(closure)
    assert_equal(parallel, plain, 1e-3)


def test_a_closure(world: mpidl.World, rng: Any) -> None:
    plain, module = seeded(mlp), seeded(mlp)
    updates = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, module)]
    parallel = DataParallel(module, updates[1], "hierarchical")
    x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)

    def closure(u: Any, m: Any, a: Any, b: Any) -> Any:
        u.zero_grad()
        loss = loss_of(m(a), b)
        loss.backward()
        return loss

    updates[0].step(lambda: closure(updates[0], plain, torch.from_numpy(x), torch.from_numpy(y)))
    a, b = mine(world, x), mine(world, y)
    loss = updates[1].step(closure=lambda: closure(updates[1], parallel, a, b))
    assert loss is not None
    assert_equal(parallel, plain)


def test_modules_that_differ(world: mpidl.World) -> None:
    if world.size == 1:
        return
    with pytest.raises(RankMismatch, match=r"rank 1.*shape"):
        DataParallel(torch.nn.Linear(3, 4 if world.rank != 1 else 5))
    frozen = torch.nn.Linear(3, 4)
    frozen.bias.requires_grad_(world.rank != 1)
    with pytest.raises(RankMismatch, match="frozen parameter bias"):
        DataParallel(frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: DataParallel(torch.nn.ReLU(), o), "no parameters"),
        (lambda o: DataParallel(torch.nn.Linear(2, 2), o), "not the module's"),
        (lambda o: DataParallel(torch.nn.Sequential(mlp(), o.module), o), "does not have it"),
        (lambda _: DataParallel(torch.nn.LazyLinear(3)), "no shape yet"),
        (lambda o: DataParallel(o.module, o, overlap=3), "overlap=3"),
        (lambda o: DataParallel(o.module, o, codec="bf16", strategy="ring2"), "codec|unknown"),
    ],
)
def test_what_cannot_be_is_told_on_every_rank(change: Any, message: str, world: Any) -> None:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.module = module
    with pytest.raises(MpidlError, match=message):
        change(optimizer)
    with pytest.raises(UnknownStrategy):
        DataParallel(module, strategy="no such thing")


@pytest.mark.parametrize("what", ["moved", "frozen"])
def test_what_goes_wrong_later_is_told_on_every_rank(what: str, world: Any, rng: Any) -> None:
    module = mlp()
    module[0].bias.requires_grad_(False)
    parallel = DataParallel(module, strategy="hierarchical")
    x, y = mine(world, MODELS["mlp"][1](rng)), mine(world, rng.integers(0, 11, BATCH))
    last = world.rank == world.size - 1
    if last and what == "moved":
        module[2].weight.data = module[2].weight.data.clone()
    if last and what == "frozen":
        module[0].bias.requires_grad_(True)
    match = "has left its bucket" if what == "moved" else "was frozen when"
    with pytest.raises(InvalidArgument, match=match):
        loss_of(parallel(x), y).backward()


@pytest.mark.skipif(mpidl.init().size == 1, reason="one rank owns everything")
def test_a_step_of_gradients_that_were_not_averaged(world: mpidl.World, rng: Any) -> None:
    module = mlp()
    update = torch.optim.SGD(module.parameters(), 0.1)
    parallel = DataParallel(module, update, "hierarchical")
    with parallel.no_sync():
        parallel(torch.ones(2, 20)).sum().backward()
    with pytest.raises(InvalidArgument, match="not averaged"):
        update.step()
    parallel(torch.ones(2, 20)).sum().backward()
    update.step()
    update.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    parallel(torch.ones(2, 20)).sum().backward()
    with pytest.raises(InvalidArgument, match="other parameters"):
        update.step()


@pytest.mark.skipif(mpidl.init().size == 1, reason="one rank owns everything")
def test_state_in_parts_is_not_saved_by_mistake(world: mpidl.World, rng: Any) -> None:
    parallel, mean, _, _ = train(world, rng, "mlp", "adam", 2, strategy="sharded")
    with pytest.raises(InvalidArgument, match="gather_optimizer_state"):
        mean.state_dict()
    parallel.gather_optimizer_state()
    assert len(mean.state_dict()["state"]) == 4


def test_an_error_in_backward_leaves_no_trace(world: mpidl.World, rng: Any) -> None:
    class Fails(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(_: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(*_: Any) -> Any:
            raise ValueError("on purpose")

    plain, module = seeded(mlp), seeded(mlp)
    parallel = DataParallel(module, strategy="hierarchical")
    x, y = MODELS["mlp"][1](rng), rng.integers(0, 11, BATCH)
    hidden = module[0](mine(world, x))
    with pytest.raises(ValueError, match="on purpose"):
        (parallel(mine(world, x)).sum() + Fails.apply(hidden).sum()).backward()
    for p in module.parameters():
        p.grad = None
    loss_of(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    parallel._gradients._rows = None
    loss_of(parallel(mine(world, x)), mine(world, y)).backward()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=0, atol=1e-5)
