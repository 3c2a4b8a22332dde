"""Gradients through the operations of mpidl.torch, against formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    import numpy as np

    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()


def leaf(own: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(own.standard_normal(shape)).requires_grad_()


def of_all(world: mpidl.World, tensor: Any) -> list[Any]:
    return [torch.from_numpy(a) for a in world.gather(tensor.detach().numpy())]


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=repr)
@pytest.mark.parametrize("grouped", [False, True])
def test_allreduce(op: Any, grouped: bool, world: mpidl.World, own: np.random.Generator) -> None:
    x, y, weights = leaf(own, 4, 3), leaf(own, 2), leaf(own, 4, 3).detach()
    if grouped:
        found, other = hvd.grouped_allreduce([x, y], op=op, prescale_factor=0.5)
    else:
        found, other = hvd.allreduce(x, op=op, prescale_factor=0.5), y * 0
    (found * weights).sum().backward()
    divisor = world.size if op is hvd.Average else 1
    want = torch.stack(of_all(world, weights)).sum(0) * 0.5 / divisor
    torch.testing.assert_close(x.grad, want)
    if grouped:
        assert torch.equal(y.grad, torch.zeros(2, dtype=torch.float64)) and other.requires_grad


def test_a_min_has_no_gradient(world: mpidl.World) -> None:
    x = torch.ones(3, requires_grad=True)
    found = hvd.allreduce(x, op=hvd.Min)
    with pytest.raises(InvalidArgument, match="Min has no gradient"):
        found.sum().backward()


def test_through_compression(world: mpidl.World, own: np.random.Generator) -> None:
    x = torch.ones(3, requires_grad=True)
    hvd.allreduce(x, compression=hvd.Compression.fp16, op=hvd.Sum).sum().backward()
    assert x.grad.tolist() == [world.size] * 3 and x.grad.dtype == torch.float32


def test_allgather(world: mpidl.World, own: np.random.Generator) -> None:
    rows = [int(own.integers(0, 4)), 2]
    rows[0] = world.gather(rows[0])[world.rank]
    x, y, number = leaf(own, rows[0], 3), leaf(own, 2), leaf(own)
    pair = hvd.grouped_allgather([x, y])
    numbers = hvd.allgather(number)
    weights = [torch.from_numpy(own.standard_normal(p.shape)) for p in (*pair, numbers)]
    sum((p * w).sum() for p, w in zip((*pair, numbers), weights, strict=True)).backward()
    means = [torch.stack(of_all(world, w)).mean(0) for w in weights]
    for leafs, mean, count in ((x, means[0], rows[0]), (y, means[1], 2), (number, means[2], 1)):
        start = sum(world.gather(count)[: world.rank])
        torch.testing.assert_close(leafs.grad, mean[start : start + count].reshape(leafs.shape))


def test_broadcast(world: mpidl.World, own: np.random.Generator, rng: np.random.Generator) -> None:
    root = int(rng.integers(world.size))
    x, weights = leaf(own, 5), leaf(own, 5).detach()
    (hvd.broadcast(x, root) * weights).sum().backward()
    mean = torch.stack(of_all(world, weights)).mean(0)
    torch.testing.assert_close(x.grad, mean if world.rank == root else torch.zeros_like(mean))


@pytest.mark.parametrize("given", [False, True])
def test_alltoall(given: bool, world: mpidl.World, own: np.random.Generator) -> None:
    splits = own.integers(0, 4, world.size).tolist() if given else [2] * world.size
    x = leaf(own, sum(splits), 2)
    found = hvd.alltoall(x, splits)[0] if given else hvd.alltoall(x)
    (found * (world.rank + 1)).sum().backward()  # a row that rank r got has the gradient r + 1
    want = torch.repeat_interleave(torch.arange(1.0, world.size + 1), torch.tensor(splits))
    torch.testing.assert_close(x.grad, want.double()[:, None].expand(-1, 2))


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=repr)
def test_reducescatter(op: Any, world: mpidl.World, own: np.random.Generator) -> None:
    x, y = leaf(own, 7, 2), leaf(own, 3)
    found, other = hvd.grouped_reducescatter([x, y], op=op, postscale_factor=3.0)
    assert torch.equal(found, hvd.reducescatter(x.detach(), op=op, postscale_factor=3.0))
    ((found.sum() + other.sum()) * (world.rank + 1)).backward()
    factor = world.size if op is hvd.Sum else 1
    for each in (x, y):
        counts = [len(part) for part in torch.arange(len(each)).tensor_split(world.size)]
        owner = torch.repeat_interleave(torch.arange(1.0, world.size + 1), torch.tensor(counts))
        want = (owner * 3 * factor).double().reshape(-1, *(1,) * (each.dim() - 1))
        torch.testing.assert_close(each.grad, want.expand(each.shape).contiguous())


def test_no_gradient_where_none_is_wanted(world: mpidl.World) -> None:
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not hvd.allreduce(x).requires_grad
    assert not hvd.allgather(x.detach()).requires_grad
    assert hvd.allreduce(x).requires_grad
    assert not hvd.synchronize(hvd.allreduce_async(x)).requires_grad
