"""DistributedOptimizer, against one process with the whole batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, RankMismatch

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()
functional = torch.nn.functional

STEPS, SAMPLES = 20, 4  # of each rank

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def model(rng: np.random.Generator) -> Any:
    """Return a small model, the same on all ranks."""
    made = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    for p in made.parameters():
        p.data = torch.from_numpy(rng.standard_normal(p.shape).astype(np.float32)) / 2
    return made


def data(rng: np.random.Generator, world: mpidl.World, samples: int = SAMPLES) -> Any:
    """Return the global batch and the slice of it that is this rank's."""
    x = torch.from_numpy(rng.standard_normal((samples * world.size, 6)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 3, samples * world.size))
    return x, y, slice(samples * world.rank, samples * (world.rank + 1))


def assert_equal_models(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        text = f"{name} differs"
        torch.testing.assert_close(
            p, q, rtol=tolerance, atol=tolerance, msg=lambda m, t=text: f"{t}: {m}"
        )


def parity(
    world: mpidl.World,
    rng: np.random.Generator,
    wrap: Callable[[Any, Any], Any],
    make: Callable[[Any], Any] = OPTIMIZERS["SGD"],
    tolerance: float = 1e-5,
    step: Callable[[Any, Any], None] = lambda optimizer, _: optimizer.step(),
    single: Callable[[Any, Any], None] = lambda optimizer, _: optimizer.step(),
) -> None:
    """Train twice: this rank's part with `wrap(optimizer, model)`, all without; compare."""
    ours = model(rng)
    theirs = copy.deepcopy(ours)
    optimizer, plain = wrap(make(ours.parameters()), ours), make(theirs.parameters())
    assert isinstance(optimizer, type(plain)) and type(optimizer).__name__ == type(plain).__name__
    for _ in range(STEPS):
        x, y, mine = data(rng, world)
        for net, opt, part, end in (
            (ours, optimizer, mine, step),
            (theirs, plain, slice(None), single),
        ):
            opt.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            end(opt, net)
    assert_equal_models(ours, theirs, tolerance)


def named(optimizer: Any, net: Any, **options: Any) -> Any:
    return hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters(), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_one_process(name: str, world: mpidl.World, rng: np.random.Generator) -> None:
    parity(world, rng, named, OPTIMIZERS[name])


OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "predivide": ({"gradient_predivide_factor": 2.0}, 1e-5),
    "two groups": ({"groups": 2}, 1e-5),
    "more groups than there are parameters": ({"groups": 9}, 1e-5),
    "num_groups": ({"num_groups": 1}, 1e-5),
    "fp16": ({"compression": hvd.Compression.fp16}, 1e-2),
    "bf16": ({"compression": hvd.Compression.bf16}, 5e-2),
    "fp16 in a group": ({"compression": hvd.Compression.fp16, "groups": 1}, 1e-2),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(what: str, world: mpidl.World, rng: np.random.Generator) -> None:
    options, tolerance = OPTIONS[what]
    parity(world, rng, lambda o, net: named(o, net, **options), tolerance=tolerance)


def test_without_names(world: mpidl.World, rng: np.random.Generator) -> None:
    parity(world, rng, lambda o, _: hvd.DistributedOptimizer(o))


def test_groups_by_parameters(world: mpidl.World, rng: np.random.Generator) -> None:
    def wrap(optimizer: Any, net: Any) -> Any:
        return hvd.DistributedOptimizer(optimizer, groups=[[net[0].weight, net[2].bias]])

    parity(world, rng, wrap)


def test_sum(world: mpidl.World, rng: np.random.Generator) -> None:
    def single(optimizer: Any, net: Any) -> None:
        for p in net.parameters():
            p.grad *= world.size
        optimizer.step()

    parity(world, rng, lambda o, net: named(o, net, op=hvd.Sum), single=single)


@pytest.mark.parametrize("skip", [True, False])
def test_clipping_between_synchronize_and_step(
    skip: bool, world: mpidl.World, rng: np.random.Generator
) -> None:
    def step(optimizer: Any, net: Any) -> None:
        if hasattr(optimizer, "synchronize"):
            optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        if skip and hasattr(optimizer, "synchronize"):
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()

    parity(world, rng, named, step=step, single=step)


@pytest.mark.parametrize("ask", [True, False])
def test_gradient_scaler(ask: bool, world: mpidl.World, rng: np.random.Generator) -> None:
    """Also where the script does not call synchronize, and with a step that is skipped."""
    ours = model(rng)
    theirs = copy.deepcopy(ours)
    runs = []
    for net, wrap in ((ours, named), (theirs, lambda o, _: o)):
        optimizer = wrap(OPTIMIZERS["SGD"](net.parameters()), net)
        runs.append(
            (net, optimizer, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5))
        )
    for number in range(STEPS):
        x, y, mine = data(rng, world)
        if number == 7:
            x[-1] = float("inf")  # on the last rank
        for net, optimizer, scaler in runs:
            part = mine if net is ours else slice(None)
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(net(x[part]), y[part])).backward()
            if ask and net is ours:
                optimizer.synchronize()
                scaler.unscale_(optimizer)
                with optimizer.skip_synchronize():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
    assert runs[0][2].get_scale() == runs[1][2].get_scale() != 8.0
    assert_equal_models(ours, theirs)


def test_several_backward_passes(world: mpidl.World, rng: np.random.Generator) -> None:
    ours = model(rng)
    theirs = copy.deepcopy(ours)
    optimizer = named(OPTIMIZERS["SGD"](ours.parameters()), ours, backward_passes_per_step=2)
    plain = OPTIMIZERS["SGD"](theirs.parameters())
    for number in range(12):
        passes = 2 if number < 6 else 3
        if number == 6:
            optimizer.set_backward_passes_per_step(3)
        optimizer.zero_grad()
        plain.zero_grad()
        for _ in range(passes):
            x, y, mine = data(rng, world)
            for net, part in ((ours, mine), (theirs, slice(None))):
                functional.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
        plain.step()
    assert_equal_models(ours, theirs)
    if world.size > 1:
        for _ in range(3):
            ours(x).sum().backward()
        with pytest.raises(InvalidArgument, match="backward_passes_per_step=3"):
            ours(x).sum().backward()
        with pytest.warns(UserWarning, match="on their way"):
            optimizer.zero_grad()


def test_scheduler_and_state(world: mpidl.World, rng: np.random.Generator) -> None:
    """A scheduler made before or after, state from before, and state_dict there and back."""
    ours = model(rng)
    theirs = copy.deepcopy(ours)
    x, y, mine = data(rng, world)
    inner, plain = OPTIMIZERS["Adam"](ours.parameters()), OPTIMIZERS["Adam"](theirs.parameters())
    schedule: Any = torch.optim.lr_scheduler.StepLR
    first = schedule(inner, 2, 0.5)
    for opt, net in ((inner, ours), (plain, theirs)):
        functional.cross_entropy(net(x), y).backward()
        opt.step()
    optimizer = named(inner, ours)
    assert optimizer.state[ours[0].weight]["step"] == 1
    schedules = [
        [first, schedule(optimizer, 3, 0.3)],
        [schedule(plain, 2, 0.5), schedule(plain, 3, 0.3)],
    ]
    for number in range(12):
        x, y, mine = data(rng, world)
        for net, opt, part, those in (
            (ours, optimizer, mine, schedules[0]),
            (theirs, plain, slice(None), schedules[1]),
        ):
            opt.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            opt.step()
            for each in those:
                each.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        if number == 5:
            state = copy.deepcopy(optimizer.state_dict())
            assert state.keys() == plain.state_dict().keys()
            optimizer.load_state_dict(state)
            schedules[0][0] = schedule(optimizer, 2, 0.5)
            schedules[0][0].load_state_dict(schedules[1][0].state_dict())
    assert_equal_models(ours, theirs)


def test_hooks_of_steps_are_called_once(world: mpidl.World, rng: np.random.Generator) -> None:
    net = model(rng)
    optimizer = named(OPTIMIZERS["SGD"](net.parameters()), net)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())  # prepares the class anew
        optimizer.step()
    assert called == ["before", "after"] * 2


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_closure(search: str | None, world: mpidl.World, rng: np.random.Generator) -> None:
    ours = model(rng).double()
    theirs = copy.deepcopy(ours)
    x, y, mine = data(rng, world)
    x = x.double()
    for net, part in ((ours, mine), (theirs, slice(None))):
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4, line_search_fn=search)
        if net is ours:
            optimizer = named(optimizer, net)

        def closure(net: Any = net, part: Any = part, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x[part]), y[part])
            loss.backward()
            return loss

        for _ in range(4):
            loss = optimizer.step(closure)
        assert float(loss.detach()) > 0
    assert_equal_models(ours, theirs, 1e-6)


class Branches(torch.nn.Module):
    """Uses one branch or the other; nobody uses the third."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(model(rng) for _ in range(3))

    def forward(self, x: Any, which: int) -> Any:
        return self.branches[which](x)


@pytest.mark.parametrize("groups", [None, 2])
def test_parameters_without_a_gradient(
    groups: int | None, world: mpidl.World, rng: np.random.Generator
) -> None:
    """Those unused here count as 0; frozen ones have no part in it, also where that changes."""
    ours = Branches(rng)
    theirs = copy.deepcopy(ours)
    frozen = [net.branches[0][0].bias.requires_grad_(False) for net in (ours, theirs)]
    start = frozen[0].clone()
    sgd = torch.optim.SGD
    optimizer, plain = (
        named(sgd(ours.parameters(), lr=0.1), ours, groups=groups),
        sgd(theirs.parameters(), lr=0.1),
    )
    for number in range(6):
        if number == 3:
            assert torch.equal(frozen[0], start)
            for bias in frozen:
                bias.requires_grad_()
        x, y, mine = data(rng, world)
        optimizer.zero_grad()
        plain.zero_grad()
        functional.cross_entropy(ours(x[mine], world.rank % 2), y[mine]).backward()
        parts = x.split(SAMPLES), y.split(SAMPLES)
        for rank, (a, b) in enumerate(zip(*parts, strict=True)):
            (functional.cross_entropy(theirs(a, rank % 2), b) / world.size).backward()
        optimizer.step()
        plain.step()
    assert_equal_models(ours, theirs)
    assert not torch.equal(frozen[0], start)


@pytest.mark.parametrize("dense", [True, False])
def test_embeddings(
    dense: bool, world: mpidl.World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    """Sparse gradients, and on the second rank sometimes none."""
    ours = torch.nn.Embedding(7, 3, sparse=True)
    ours.weight.data = torch.from_numpy(rng.standard_normal((7, 3)))
    theirs = copy.deepcopy(ours)
    optimizer = named(
        torch.optim.SparseAdam(ours.parameters(), lr=0.1), ours, sparse_as_dense=dense
    )
    plain = torch.optim.SparseAdam(theirs.parameters(), lr=0.1)
    for number in range(8):
        words = torch.from_numpy(own.integers(0, 7, 5))
        mine = ours(words).square().sum()
        if number % 2 and world.rank == 1:
            words, mine = words[:0], None
        optimizer.zero_grad()
        plain.zero_grad()
        if mine is not None:
            mine.backward()
        together = torch.from_numpy(np.concatenate(world.gather(words.numpy())))
        (theirs(together).square().sum() / world.size).backward()
        optimizer.step()
        plain.step()
    assert_equal_models(ours, theirs)


def test_new_group(world: mpidl.World, rng: np.random.Generator) -> None:
    ours = model(rng)
    theirs = copy.deepcopy(ours)
    sgd = torch.optim.SGD
    optimizer = hvd.DistributedOptimizer(sgd(ours[0].parameters(), lr=0.1))
    plain = sgd(theirs[0].parameters(), lr=0.1)
    for net, opt in ((ours, optimizer), (theirs, plain)):
        opt.add_param_group({"params": list(net[2].parameters()), "lr": 0.2})
    for _ in range(4):
        x, y, mine = data(rng, world)
        for net, opt, part in ((ours, optimizer, mine), (theirs, plain, slice(None))):
            opt.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            opt.step()
    assert_equal_models(ours, theirs)


def test_two_optimizers_at_once(world: mpidl.World, rng: np.random.Generator) -> None:
    """As in a GAN: gradients of both are on their way together, under the same names."""
    nets = [model(rng), model(rng)]
    optimizers = [named(torch.optim.SGD(net.parameters(), lr=0.1), net) for net in nets]
    x, y, mine = data(rng, world)
    sum(functional.cross_entropy(net(x[mine]), y[mine]) for net in nets).backward()
    for optimizer, net in zip(optimizers, nets, strict=True):
        grads = torch.autograd.grad(functional.cross_entropy(net(x), y), list(net.parameters()))
        optimizer.synchronize()
        for p, grad in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)


def test_one_more_optimizer_on_one_rank(world: mpidl.World, rng: np.random.Generator) -> None:
    kept = []
    model = torch.nn.Linear(2, 2)
    if world.rank == 0:
        for _ in range(2):
            teacher = torch.nn.Sequential(torch.nn.Linear(2, 2)).named_parameters()
            teacher = [(f"teacher.{name}", param) for name, param in teacher]
            made = torch.optim.SGD([param for _, param in teacher], lr=0.1)
            kept.append(hvd.DistributedOptimizer(made, teacher))
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(made, model.named_parameters())
    before = model.bias.detach().clone()
    model(torch.full((1, 2), float(world.rank))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.1)


def test_a_frozen_parameter_does_not_decay(world: mpidl.World) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    hvd.broadcast_parameters(model.state_dict())
    made = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = hvd.DistributedOptimizer(made, model.named_parameters(), groups=1)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x = torch.full((1, 2), 1.0 + world.rank)
    model(x).sum().backward()
    assert world.size == 1 or optimizer._averages.begun
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    want = before["1.bias"] - 0.1 * (1 + 0.1 * before["1.bias"])
    torch.testing.assert_close(model[1].bias.detach(), want)


def test_after_a_step_that_skips(world: mpidl.World, rng: np.random.Generator) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    hvd.broadcast_parameters(model.state_dict())
    made = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(made, model.named_parameters())
    for step in range(2):
        model.zero_grad()
        before = model.weight.detach().clone()
        if step == 0 or world.rank == 0:
            model(torch.ones(1, 2)).sum().backward()
        if step:
            optimizer.step()
            torch.testing.assert_close(model.weight.detach(), before - 1 / world.size)
            continue
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()


def test_what_failed_is_forgotten(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    params = [torch.ones(2 + min(world.rank, 1), requires_grad=True) for _ in range(3)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(params, lr=0.1))
    pending = hvd.session._session.pending
    before = set(pending)
    sum(param.sum() for param in params).backward()
    assert len(pending) == len(before) + 3
    with pytest.raises(RankMismatch):
        optimizer.step()
    assert set(pending) == before
    hvd.barrier()


def test_zero_grad_too_early(world: mpidl.World, rng: np.random.Generator) -> None:
    net = model(rng)
    optimizer = named(torch.optim.SGD(net.parameters(), lr=0.1), net)
    net(torch.ones(1, 6)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
    assert len(caught) == (world.size > 1)
    assert all(p.grad is None for p in net.parameters())
    net(torch.ones(1, 6)).sum().backward()  # all passes are expected again
    optimizer.step()
    optimizer.zero_grad()


def test_in_a_process_set(world: mpidl.World, rng: np.random.Generator) -> None:
    if world.size < 3:
        pytest.skip("takes 3 ranks")
    some = hvd.add_process_set([0, 2])
    net = model(rng)
    optimizer = named(torch.optim.SGD(net.parameters(), lr=0.1), net, process_set=some)
    (net(torch.ones(1, 6)).sum() * world.rank).backward()
    optimizer.step()
    mean = 1.0 if some.included() else float(world.rank)  # of 0 and 2; others are by themselves
    assert net[2].bias.grad.tolist() == [mean] * 3
    hvd.remove_process_set(some)


def test_adasum(world: mpidl.World, rng: np.random.Generator) -> None:
    """Equal steps stay as they are; steps that share nothing are added."""
    same, apart = (torch.nn.Parameter(torch.zeros(world.size)) for _ in range(2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([same, apart], lr=0.5, momentum=0.9), op=hvd.Adasum
    )
    for _ in range(2):
        optimizer.zero_grad()
        (same.sum() + apart[world.rank]).backward()
        optimizer.step()
    moved = torch.full((world.size,), -0.5 - 0.5 * 1.9)
    torch.testing.assert_close(same.detach(), moved)
    torch.testing.assert_close(apart.detach(), moved)
    with pytest.raises(InvalidArgument):
        optimizer.skip_synchronize()


def test_wrong_arguments(world: mpidl.World, rng: np.random.Generator) -> None:
    net = model(rng)
    pairs = list(net.named_parameters())

    def wrong(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), **options)

    wrong("each name once, not 0.weight", named_parameters=[*pairs, pairs[0]])
    wrong("not among them", named_parameters=pairs[1:])
    wrong("pairs", named_parameters=list(net.parameters()))
    wrong("expected op=Average", op=hvd.Sum, gradient_predivide_factor=2.0)
    wrong("backward_passes_per_step=0", backward_passes_per_step=0)
    wrong("groups=-1", groups=-1)
    wrong("one group at most", groups=[[pairs[0][1]], [pairs[0][1]]])
    wrong("lists of parameters", groups=[pairs[0][1]])


def test_mismatch(world: mpidl.World) -> None:
    """Told on every rank, and the optimizer can go on."""
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    p = torch.nn.Parameter(torch.ones(2 + min(world.rank, 1)))
    q = torch.nn.Parameter(torch.ones(2))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=1.0))
    (p.sum() + q.sum()).backward()
    with pytest.raises(RankMismatch):
        optimizer.step()
    with pytest.raises(hvd.HorovodInternalError):
        optimizer.step()
    p.requires_grad_(False)
    optimizer.zero_grad()
    (q.sum() * world.size * (world.rank == 0)).backward()
    optimizer.step()
    assert q.detach().tolist() == [0.0, 0.0]
