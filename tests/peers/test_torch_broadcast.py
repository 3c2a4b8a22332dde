"""Equal starts: parameters and optimizers of mpidl.torch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, RankMismatch

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()

#: All of torch.optim that dense gradients suit, with options that make state of several kinds.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {"max_iter": 3},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
}


def net(own: np.random.Generator) -> Any:
    made = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    for p in made.parameters():
        p.data = torch.from_numpy(own.standard_normal(p.shape).astype(np.float32))
    return made


def step(optimizer: Any, model: Any, own: np.random.Generator) -> None:
    x = torch.from_numpy(own.standard_normal((5, 3)).astype(np.float32))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def flat(value: Any) -> list[Any]:
    """Return the leaves of a structure, tensors as lists."""
    if isinstance(value, dict):
        return [x for key, item in value.items() for x in (key, *flat(item))]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    return [str(value.dtype), value.tolist()] if isinstance(value, torch.Tensor) else [value]


@pytest.mark.parametrize("how", ["state_dict", "named", "plain"])
def test_parameters(
    how: str, world: mpidl.World, own: np.random.Generator, rng: np.random.Generator
) -> None:
    model, root = net(own), int(rng.integers(world.size))
    model[1].running_mean += world.rank
    given = {
        "state_dict": model.state_dict(),
        "named": model.named_parameters(),
        "plain": model.parameters(),
    }[how]
    want = world.broadcast([p.detach().numpy().copy() for p in model.parameters()], root)
    hvd.broadcast_parameters(given, root_rank=root)
    for p, array in zip(model.parameters(), want, strict=True):
        assert p.detach().numpy().tolist() == array.tolist() and p.requires_grad
    assert model[1].running_mean[0] == (root if how == "state_dict" else world.rank)


def test_parameters_that_differ(world: mpidl.World, own: np.random.Generator) -> None:
    with pytest.raises(InvalidArgument, match="expected a state_dict"):
        hvd.broadcast_parameters([1.0])
    if world.size == 1:
        return
    model = torch.nn.Linear(3, 2 + (world.rank == world.size - 1))
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(RankMismatch, match="rank 0 has"):
        hvd.broadcast_parameters(model.state_dict())
    assert flat(model.state_dict()) == flat(kept)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(
    name: str,
    wrapped: bool,
    world: mpidl.World,
    own: np.random.Generator,
    rng: np.random.Generator,
) -> None:
    """The root may have more state than others, or less; parameters do not change."""
    root = int(rng.integers(world.size))
    model = net(own)
    make = getattr(torch.optim, name)
    optimizer = make(model.parameters(), lr=0.1 + world.rank, **OPTIMIZERS[name])
    for _ in range(int(own.integers(0, 3))):
        step(optimizer, model, own)
    if wrapped:
        optimizer = hvd.DistributedOptimizer(optimizer)
    parameters = copy.deepcopy(model.state_dict())
    want = world.broadcast(flat(optimizer.state_dict()), root)
    hvd.broadcast_optimizer_state(optimizer, root_rank=root)
    assert flat(optimizer.state_dict()) == want
    assert flat(model.state_dict()) == flat(parameters)
    assert optimizer.param_groups[0]["lr"] == 0.1 + root
    hvd.broadcast_parameters(model.state_dict(), root)
    same = np.random.default_rng(1)
    step(optimizer, model, same)  # goes on alike on all ranks
    found = world.gather([p.detach().numpy().tolist() for p in model.parameters()])
    assert all(each == found[0] for each in found)


def test_groups_that_differ(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2 + (world.rank == 1))]
    with pytest.raises(InvalidArgument, match="rank 0 has"):
        hvd.broadcast_optimizer_state(torch.optim.SGD(params, lr=0.1))
