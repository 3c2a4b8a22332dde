"""SyncBatchNorm, against torch.nn.BatchNorm on the whole batch."""

from __future__ import annotations

import collections
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

SHAPES = {2: (), 3: (5,), 4: (3, 4), 5: (2, 3, 2)}
PLAIN = {
    2: torch.nn.BatchNorm1d,
    3: torch.nn.BatchNorm1d,
    4: torch.nn.BatchNorm2d,
    5: torch.nn.BatchNorm3d,
}
CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (3, {"momentum": None}),
    (4, {"eps": 1e-3, "momentum": 0.3}),
    (5, {"affine": False}),
    (4, {"track_running_stats": False}),
]


def close(found: Any, want: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("dims", "options"), CASES, ids=str)
def test_as_one_process(
    dims: int,
    options: dict[str, Any],
    dtype: Any,
    world: mpidl.World,
    rng: np.random.Generator,
) -> None:
    """Three steps with unequal parts, also none; then evaluation."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    ours = hvd.SyncBatchNorm(4, **options).to(dtype)
    if ours.affine:
        for p in ours.parameters():
            p.data = torch.from_numpy(rng.standard_normal(4)).to(dtype)
    theirs = PLAIN[dims](4, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        counts = rng.integers(1, 5, world.size)
        if step == 1:
            counts[int(rng.integers(world.size))] = 0 if world.size > 1 else 3
        bounds = np.concatenate([[0], np.cumsum(counts)])
        shape = (int(bounds[-1]) + 1, 4, *SHAPES[dims])  # one element has no variance
        counts[-1] += 1
        bounds[-1] += 1
        mean = 100 if dtype == torch.float64 else 10  # far ones lose digits, in torch too
        x = torch.from_numpy(rng.standard_normal(shape) * 3 + mean).to(dtype)
        weights = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        mine = slice(int(bounds[world.rank]), int(bounds[world.rank + 1]))
        a, b = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        found, want = ours(a), theirs(b)
        assert found.dtype == dtype
        (found * weights[mine]).sum().backward()
        (want * weights).sum().backward()
        scale = 1 if dtype == torch.float64 else 10
        close(found, want[mine], tolerance * scale)
        close(a.grad, b.grad[mine], tolerance * scale)
        if ours.affine:
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                close(hvd.allreduce(p.grad, op=hvd.Sum), q.grad, tolerance * 100)
                p.grad = q.grad = None
        states = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
        for (_, mine_of), their in states:
            close(mine_of, their, tolerance * scale)
    ours.eval()
    theirs.eval()
    if ours.track_running_stats and world.rank == 0:  # not collective
        close(ours(x[:2]), theirs(x[:2]), tolerance * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: Any, world: mpidl.World, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((4 * world.size, 3, 2)))
    mine = x[4 * world.rank : 4 * (world.rank + 1)].to(dtype).requires_grad_()
    layer, plain = hvd.SyncBatchNorm(3), torch.nn.BatchNorm1d(3).double()
    found = layer(mine)
    assert found.dtype == dtype
    want = plain(x.to(dtype).double())[4 * world.rank : 4 * (world.rank + 1)]
    close(found.double(), want, 2e-2)
    found.sum().backward()
    assert mine.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    close(layer.running_var.double(), plain.running_var, 1e-5)


def test_second_input_without_a_gradient(world: mpidl.World, rng: np.random.Generator) -> None:
    """The first layer of a model: only its weights need one."""
    layer = hvd.SyncBatchNorm(2)
    x = torch.from_numpy(rng.standard_normal((6, 2)).astype(np.float32))
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_model_is_converted(world: mpidl.World, rng: np.random.Generator) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.BatchNorm1d(4, momentum=None))
    )
    kept = copy.deepcopy(model.state_dict())
    weight = model[1][0].weight
    made = hvd.SyncBatchNorm.convert_sync_batchnorm(model.eval())
    assert isinstance(made[1][0], hvd.SyncBatchNorm) and made[1][0].momentum is None
    assert made[1][0].weight is weight and not made[1][0].training
    assert made.state_dict().keys() == kept.keys()


def test_errors_name_the_layer(world: mpidl.World) -> None:
    def net(features: int) -> Any:
        inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm1d(features))
        return hvd.SyncBatchNorm.convert_sync_batchnorm(
            torch.nn.Sequential(collections.OrderedDict(stem=inner, last=torch.nn.ReLU()))
        )

    with pytest.raises(InvalidArgument, match=r"^stem\.1: SyncBatchNorm\(4, .*\(2, 3\)"):
        net(4)(torch.ones(2, 3))
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    features = 4 + (world.rank == world.size - 1)
    for model, told in (
        (net(features), r"layer \d+, stem\.1\.forward': allgather: shape"),
        (hvd.SyncBatchNorm(features), r"layer \d+, SyncBatchNorm\.forward': allgather: shape"),
    ):
        with pytest.raises(RankMismatch, match=told) as caught:
            model(torch.ones(2, features))
        assert len({*world.gather(str(caught.value))}) == 1


def test_wrong_shapes(world: mpidl.World) -> None:
    layer = hvd.SyncBatchNorm(3)
    for shape in ((3,), (2, 4)):
        with pytest.raises(InvalidArgument, match="expected"):
            layer(torch.ones(shape))
