"""Operations of mpidl.torch, against NumPy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, RankMismatch, UnsupportedDtype

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
OPS = {
    hvd.Sum: lambda stack: stack.sum(0),
    hvd.Average: lambda stack: stack.sum(0) / len(stack),
    hvd.Min: lambda stack: stack.amin(0),
    hvd.Max: lambda stack: stack.amax(0),
    hvd.Product: lambda stack: stack.prod(0),
}
SHAPES = [(), (0,), (1,), (7, 3), (2, 3, 4, 5)]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a tensor with whole numbers, whose sums and products any dtype can hold."""
    return torch.from_numpy(rng.integers(0, 3, shape)).to(dtype)


def stacked(world: mpidl.World, tensor: Any) -> Any:
    """Return the tensors of all ranks (ranks, ...), in float64."""
    return torch.stack([torch.from_numpy(a) for a in world.gather(tensor.double().numpy())])


@pytest.mark.parametrize("op", OPS, ids=repr)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_allreduce(
    op: Any, dtype: Any, world: mpidl.World, own: np.random.Generator, rng: np.random.Generator
) -> None:
    shape = SHAPES[rng.integers(len(SHAPES))]
    mine = draw(own, shape, dtype)
    kept = mine.clone()
    want = OPS[op](stacked(world, mine))
    want = want.trunc() if not dtype.is_floating_point else want
    found = [hvd.allreduce(mine, op=op), hvd.synchronize(hvd.allreduce_async(mine, op=op))]
    assert torch.equal(mine, kept)
    places = [mine.clone(), mine.clone()]
    found += [hvd.allreduce_(places[0], op=op)]
    found += [hvd.synchronize(hvd.allreduce_async_(places[1], op=op, name="x"))]
    assert found[2] is places[0] and found[3] is places[1]
    for each in found:
        assert each.dtype == dtype and each.shape == shape
        torch.testing.assert_close(each.double(), want.to(dtype).double())


def test_scales_and_old_arguments(world: mpidl.World, own: np.random.Generator) -> None:
    x = torch.from_numpy(own.standard_normal(9))
    total = stacked(world, x).sum(0)
    scaled = hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
    torch.testing.assert_close(scaled, total * 1.5)
    torch.testing.assert_close(hvd.allreduce(x), total / world.size)
    torch.testing.assert_close(hvd.allreduce(x, average=False), total)
    torch.testing.assert_close(hvd.allreduce_(x.clone(), True), total / world.size)
    with pytest.raises(ValueError, match="not both"):
        hvd.allreduce(x, average=True, op=hvd.Sum)
    with pytest.raises(ValueError, match="op=9"):
        hvd.allreduce(x, op=9)


def test_bool(world: mpidl.World, own: np.random.Generator) -> None:
    mine = torch.from_numpy(own.random(50) < 0.5)
    stack = stacked(world, mine).bool()
    assert torch.equal(hvd.allreduce(mine, op=hvd.Max), stack.any(0))
    assert torch.equal(hvd.allreduce(mine, op=hvd.Min), stack.all(0))
    gathered = hvd.allgather(mine)
    assert gathered.dtype == torch.bool and torch.equal(gathered, stack.reshape(-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensors_with_gaps(dtype: Any, world: mpidl.World, own: np.random.Generator) -> None:
    whole = draw(own, (6, 8), dtype)
    stack = stacked(world, whole).sum(0).to(dtype)
    for view in (lambda x: x[::2], lambda x: x.t(), lambda x: x[:, 3], lambda x: x[1:4, 2:5]):
        mine = whole.clone()
        assert hvd.allreduce_(view(mine), op=hvd.Sum).shape == view(whole).shape
        want = whole.clone()
        view(want).copy_(view(stack))
        assert torch.equal(mine, want)
        assert torch.equal(hvd.allreduce(view(whole), op=hvd.Sum), view(stack))
        mine = whole.clone()
        hvd.broadcast_(view(mine), world.size - 1)
        last = torch.from_numpy(world.gather(whole.double().numpy())[-1]).to(dtype)
        assert torch.equal(view(mine), view(last))
        gathered = hvd.allgather(view(whole))
        parts = [view(torch.from_numpy(a)) for a in world.gather(whole.double().numpy())]
        assert torch.equal(gathered.double(), torch.cat(parts))


def test_an_allreduce_leaves_gradients_alone(world: mpidl.World) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    hvd.allreduce_(parameter, op=hvd.Sum)  # a leaf that requires grad
    assert torch.equal(parameter.detach(), torch.full((3,), float(world.size)))
    assert parameter.requires_grad and parameter.grad is None


def test_adasum(world: mpidl.World, own: np.random.Generator) -> None:
    x = torch.from_numpy(own.standard_normal(8).astype(np.float32))
    same = torch.arange(1.0, 9)
    torch.testing.assert_close(hvd.allreduce(same, op=hvd.Adasum), same)
    apart = torch.zeros(world.size, 4)
    apart[world.rank] = x[:4]
    total = torch.from_numpy(world.sum(apart.flatten().numpy())).float().reshape(world.size, 4)
    torch.testing.assert_close(hvd.allreduce(apart, op=hvd.Adasum), total)


def test_a_thousand_in_any_order(world: mpidl.World, own: np.random.Generator) -> None:
    tensors = [torch.full((i % 17,), float(world.rank + i)) for i in range(1000)]
    for _ in range(2):  # known names are another way
        copies = [t.clone() for t in tensors]
        handles = {i: hvd.allreduce_async_(copies[i], name=f"t{i}") for i in own.permutation(1000)}
        assert all(isinstance(handle, int) for handle in handles.values())
        for i in own.permutation(1000):
            found = hvd.synchronize(handles[i])
            assert found is copies[i]
            assert torch.equal(found, torch.full((i % 17,), i + (world.size - 1) / 2))


def test_poll_and_handles(world: mpidl.World) -> None:
    handle = hvd.allreduce_async(torch.ones(4), name="polled")
    group = hvd.grouped_allreduce_async([torch.ones(4), torch.ones(2)])
    while not (hvd.poll(handle) and hvd.poll(group)):
        pass
    assert torch.equal(hvd.synchronize(handle), torch.ones(4))
    assert [len(x) for x in hvd.synchronize(group)] == [4, 2]
    for ask in (hvd.poll, hvd.synchronize):
        with pytest.raises(ValueError, match="synchronized already"):
            ask(handle)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_gather_broadcast_and_exchange(
    dtype: Any, world: mpidl.World, own: np.random.Generator, rng: np.random.Generator
) -> None:
    rows, root = int(own.integers(0, 4)), int(rng.integers(world.size))
    mine = draw(own, (rows, 3), dtype)
    parts = [torch.from_numpy(a).to(dtype) for a in world.gather(mine.double().numpy())]
    assert torch.equal(hvd.allgather(mine), torch.cat(parts))
    assert torch.equal(
        hvd.allgather(mine.sum().to(dtype)), torch.stack([p.sum() for p in parts]).to(dtype)
    )

    mine = draw(own, (5, 2), dtype)
    root_has = torch.from_numpy(world.broadcast(mine.double().numpy(), root)).to(dtype)
    assert torch.equal(hvd.broadcast(mine, root), root_has)
    assert torch.equal(hvd.synchronize(hvd.broadcast_async(mine, root)), root_has)
    assert hvd.broadcast_(mine, root) is mine and torch.equal(mine, root_has)

    splits = own.integers(0, 3, world.size)
    mine = draw(own, (int(splits.sum()), 2), dtype)
    sent = world.gather([p.double().numpy() for p in mine.split(splits.tolist())])
    want = [torch.from_numpy(parts[world.rank]).to(dtype) for parts in sent]
    for given in (torch.from_numpy(splits), splits.tolist()):
        found, received = hvd.alltoall(mine, given)
        assert torch.equal(found, torch.cat(want)) and received.dtype == torch.int32
        assert received.tolist() == [len(p) for p in want]
    even = draw(own, (2 * world.size,), dtype)
    sent = world.gather([p.double().numpy() for p in even.split(2)])
    found = hvd.synchronize(hvd.alltoall_async(even))
    assert found.tolist() == [x for parts in sent for x in parts[world.rank]]


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=repr)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 3, 8])
def test_reducescatter(
    rows: int, dtype: Any, op: Any, world: mpidl.World, own: np.random.Generator
) -> None:
    mine = draw(own, (rows, 3), dtype)
    want = OPS[op](stacked(world, mine)).to(dtype).tensor_split(world.size)[world.rank]
    torch.testing.assert_close(hvd.reducescatter(mine, op=op), want)
    handle = hvd.reducescatter_async(mine, op=op, prescale_factor=2.0, postscale_factor=2.0)
    torch.testing.assert_close(hvd.synchronize(handle), want * 4)


def test_groups(world: mpidl.World, own: np.random.Generator) -> None:
    tensors = [
        draw(own, shape, dtype) for shape, dtype in zip(SHAPES, [*FLOATS, torch.int64], strict=True)
    ]
    sums = [stacked(world, t).sum(0).to(t.dtype) for t in tensors]

    def check(found: list[Any], want: list[Any]) -> None:
        assert isinstance(found, list) and len(found) == len(want)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, want, strict=True)
        )

    check(hvd.grouped_allreduce(tensors, op=hvd.Sum), sums)
    check(hvd.synchronize(hvd.grouped_allreduce_async(tensors, op=hvd.Sum, name="g")), sums)
    check(hvd.grouped_allreduce([tensors[3]], average=False), [sums[3]])
    for inplace in (
        hvd.grouped_allreduce_,
        lambda *a, **k: hvd.synchronize(hvd.grouped_allreduce_async_(*a, **k)),
    ):
        copies = [t.clone() for t in tensors]
        found = inplace(copies, op=hvd.Sum, name="g")
        check(copies, sums)
        assert all(a is b for a, b in zip(found, copies, strict=True))
    check(
        hvd.grouped_allgather([t.reshape(-1) for t in tensors]),
        [torch.cat([s.flatten() for s in stacked(world, t)]).to(t.dtype) for t in tensors],
    )
    rows = [t.reshape(-1) for t in tensors]
    want = [s.reshape(-1).tensor_split(world.size)[world.rank] for s in sums]
    check(hvd.grouped_reducescatter(rows, op=hvd.Sum), want)
    with pytest.raises(ValueError, match="at least one"):
        hvd.grouped_allreduce_async([])


def test_groups_that_begin_in_different_orders(
    world: mpidl.World, own: np.random.Generator
) -> None:
    groups = [[torch.full((3,), float(i + j)) for j in range(4)] for i in range(6)]
    handles = {
        int(i): hvd.grouped_allreduce_async(groups[i], name=f"g{i}") for i in own.permutation(6)
    }
    for i in own.permutation(6):
        found = hvd.synchronize(handles[int(i)])
        assert [float(x[0]) for x in found] == [i, i + 1, i + 2, i + 3]


@pytest.mark.parametrize(
    "compression", [hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.bf16]
)
def test_compression(compression: Any, world: mpidl.World, own: np.random.Generator) -> None:
    x = torch.from_numpy(own.standard_normal(100).astype(np.float32))
    stack = stacked(world, x)
    want = stack.mean(0).float()
    digits = {"none": 1e-6, "fp16": 2e-3, "bf16": 2e-2}
    name = next(n for n in digits if getattr(hvd.Compression, n) is compression)
    found = hvd.allreduce(x, compression=compression)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=digits[name], atol=digits[name])
    if name != "none" and world.size > 1:
        assert not torch.equal(found, want)
    counts = hvd.allreduce(torch.tensor([1 << 20]), compression=compression, op=hvd.Sum)
    assert counts.item() == world.size << 20  # integers are left alone


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=repr)
def test_sparse_tensors_of_other_shapes(op: Any, world: mpidl.World) -> None:
    """Their indices would be beyond those of the others."""
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    rows = 6 + (world.rank == world.size - 1)
    mine = torch.sparse_coo_tensor([[rows - 1]], torch.ones(1, 2), (rows, 2), check_invariants=True)
    with pytest.raises(RankMismatch, match=r"'sparse': shape: .*\(6, 2\).*\(7, 2\)") as caught:
        hvd.synchronize(hvd.sparse_allreduce_async(mine, "sparse", op))
    assert isinstance(caught.value, hvd.HorovodInternalError) and caught.value.collective
    assert len({*world.gather(str(caught.value))}) == 1
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="sparse").item() == world.size


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
def test_sparse(op: Any, world: mpidl.World, own: np.random.Generator) -> None:
    for rows in (0, 4):
        places = torch.from_numpy(own.integers(0, 6, (1, rows)))  # some come twice
        values = torch.from_numpy(own.standard_normal((rows, 2)))
        mine = torch.sparse_coo_tensor(places, values, (6, 2), check_invariants=True)
        want = OPS[op](stacked(world, mine.to_dense()))
        found = hvd.synchronize(hvd.sparse_allreduce_async(mine, "sparse", op))
        assert found.is_sparse
        torch.testing.assert_close(found.to_dense(), want)


def test_join(world: mpidl.World) -> None:
    steps = 3 + 2 * world.rank
    for step in range(steps):
        there = [r for r in range(world.size) if step < 3 + 2 * r]
        found = hvd.allreduce(torch.ones(3), op=hvd.Sum, name=f"step {step}")
        assert found.tolist() == [len(there)] * 3
        mean = hvd.allreduce(torch.full((2,), float(world.size)))
        assert mean.tolist() == [len(there)] * 2
    assert hvd.join() == world.size - 1
    hvd.barrier()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == world.size  # names fit again


def test_while_a_rank_waits_in_join(world: mpidl.World) -> None:
    """What needs all ranks is raised on those that are not there, and hangs nobody."""
    if world.rank:
        for op in (hvd.Min, hvd.Max, hvd.Product):
            with pytest.raises(RankMismatch, match="rank 0 has joined"):
                hvd.allreduce(torch.ones(2), op=op, name="spoiled")
        with pytest.raises(RankMismatch, match="rank 0"):
            hvd.broadcast_parameters([("x", torch.ones(2))], root_rank=1)
        for wanted in ([0], [world.size - 1]):
            with pytest.raises(RankMismatch, match="rank 0"):
                hvd.add_process_set(wanted)
        optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
        with pytest.raises(RankMismatch, match="rank 0"):
            hvd.broadcast_optimizer_state(optimizer, 0)
    hvd.join()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_the_average_of_small_integers_does_not_wrap(dtype: Any, world: mpidl.World) -> None:
    top = torch.iinfo(dtype).max
    mine = torch.full((world.size,), top - world.rank % 2, dtype=dtype)
    want = (world.size * top - world.size // 2) // world.size
    assert hvd.allreduce(mine, name="small").tolist() == [want] * world.size
    assert hvd.reducescatter(mine, name="small rows").tolist() == [want]


MISMATCHES = {
    "group": lambda r: hvd.grouped_allreduce([torch.ones(1)] * (1 + min(r, 1)), name="bad"),
    "factor": lambda r: hvd.allreduce(torch.ones(3), prescale_factor=["x", 1.0][r % 2], name="bad"),
    "shape": lambda r: hvd.allreduce(torch.ones(3 + r), name="bad"),
    "dtype": lambda r: hvd.allreduce(torch.ones(3, dtype=FLOATS[r % 2]), name="bad"),
    "op": lambda r: hvd.allreduce(torch.ones(3), op=[hvd.Sum, hvd.Max][r % 2], name="bad"),
    "scale": lambda r: hvd.allreduce(torch.ones(3), prescale_factor=1.0 + r, name="bad"),
    "kind": lambda r: hvd.allreduce(torch.ones(3)) if r else hvd.allgather(torch.ones(3)),
    "root": lambda r: hvd.broadcast(torch.ones(3), r % 2, name="bad"),
    "columns": lambda r: hvd.allgather(torch.ones(3, 2 + r), name="bad"),
    "sparse": lambda r: hvd.synchronize(
        hvd.allreduce_async(torch.ones(3), name="bad")
        if r
        else hvd.sparse_allreduce_async(torch.ones(3).to_sparse(), "bad", hvd.Average)
    ),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatches_are_raised_on_every_rank(what: str, world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(RankMismatch) as caught:
        MISMATCHES[what](world.rank)
    assert isinstance(caught.value, (hvd.HorovodInternalError, RuntimeError))
    assert isinstance(caught.value, hvd.HorovodInternalError)
    assert hvd.allreduce(torch.ones(3), op=hvd.Sum, name="bad").tolist() == [world.size] * 3
    for _ in range(3):  # the third time by numbers
        found = hvd.grouped_allreduce([torch.ones(1)], op=hvd.Sum, name="bad")
        assert found[0].item() == world.size


def test_what_is_wrong_everywhere(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument) as caught:
        hvd.alltoall(torch.ones(3), [1] * world.size + [7])
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(InvalidArgument, match="dense"):
        hvd.allreduce_(torch.ones(3).to_sparse())
    with pytest.raises(InvalidArgument, match="dense"):
        hvd.allreduce_async_(np.ones(3))
    with pytest.raises(UnsupportedDtype):
        hvd.allreduce(torch.ones(3).to(torch.float8_e4m3fn))
    with pytest.raises(InvalidArgument, match="root_rank"):
        hvd.broadcast(torch.ones(3), world.size)
    handle = hvd.allreduce_async(torch.ones(3), name="twice")
    hvd.barrier()
    if world.size > 1:
        first = (
            hvd.allreduce_async(torch.ones(math.prod((2, 3))), name="held") if world.rank else None
        )
        if world.rank:
            with pytest.raises(InvalidArgument, match="in flight"):
                hvd.allreduce_async(torch.ones(6), name="held")
        hvd.barrier()
        first = first or hvd.allreduce_async(torch.ones(6), name="held")
        assert hvd.synchronize(first).tolist() == [1.0] * 6
    assert hvd.synchronize(handle).tolist() == [1.0] * 3
