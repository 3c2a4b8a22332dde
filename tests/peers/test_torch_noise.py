"""The gradient noise scale of a torch module: that of the engine, from the same gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

import mpidl  # noqa: E402
import mpidl.torch as mt  # noqa: E402
from mpidl import optim  # noqa: E402
from mpidl.errors import InvalidArgument, RankMismatch  # noqa: E402
from mpidl.overlap import WATCHED  # noqa: E402
from tests.ranks.test_noise import MEANS, Quadratic  # noqa: E402

SIZES = (17, 4, 301)


class TorchQuadratic(torch.nn.Module):  # type: ignore[misc]
    """Mean over samples of |w - x|^2 / 2; the second of the parameters is frozen."""

    def __init__(self, dtype: Any = torch.float64) -> None:
        super().__init__()
        self.w = torch.nn.ParameterList(torch.zeros(size, dtype=dtype) for size in SIZES)
        self.w[1].requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return ((torch.cat([*self.w]) - x) ** 2).sum() * (0.5 / len(x))


def samples(rng: np.random.Generator, rows: int) -> Any:
    return rng.standard_normal((rows, sum(SIZES))) + 0.3


def both(world: mpidl.World, strategy: str, batches: Any, **options: Any) -> tuple[Any, Any]:
    """Return what torch and the engine find in this rank's batches; one may be empty."""
    module = TorchQuadratic()
    sgd = torch.optim.SGD(module.parameters(), 0.0)
    model = mt.DataParallel(
        module, sgd, strategy, world=world, noise_every=1, bucket_bytes=900, **options
    )
    engine = Quadratic(np, *SIZES)
    engine.parts[1].w.requires_grad = False
    replica = mpidl.DataParallel(
        engine, optim.SGD(0.0), strategy, world=world, noise_every=1, overlap=False
    )
    for x in batches:
        if len(x):
            model(torch.from_numpy(x)).backward()
            engine(mpidl.tensor(x)).backward()
        else:
            model.average_gradients()
        replica.step(len(x))
        sgd.step()
        sgd.zero_grad()
    if options.get("overlap"):
        assert model._gradients.overlap.active
    found = model.noise, replica.noise
    assert len(set(world.gather(str(model.noise.record())))) == 1
    model.close()
    replica.close()
    return found


def same(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
    assert ours.estimates == theirs.estimates
    assert ours.batch == theirs.batch
    np.testing.assert_allclose(ours.trace, theirs.trace, rtol=rtol)
    atol = 0 if ours.estimates == 0 else rtol * ours.trace
    np.testing.assert_allclose(ours.squared_norm, theirs.squared_norm, rtol=rtol, atol=atol)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("strategy", MEANS)
def test_as_the_engine(strategy: str, overlap: bool, world: mpidl.World, own: Any) -> None:
    steps = WATCHED + 3 if overlap else 3
    rows = [int(own.integers(1, 9)) for _ in range(steps)]
    if 0 < world.rank == world.size - 1 and not overlap:
        rows[1] = 0
    ours, theirs = both(world, strategy, [samples(own, n) for n in rows], overlap=overlap)
    lost = world.size == 2 and not overlap  # a step in which one rank has samples
    assert ours.estimates == (steps - lost if world.size > 1 else 0)
    same(ours, theirs)


def test_microbatches(world: mpidl.World, rng: Any) -> None:
    """The same bits on any number of ranks, which are the engine's."""
    batches = [samples(rng, 13) for _ in range(3)]
    records = []
    for ranks in (world, world.alone()):
        model = mt.DataParallel(TorchQuadratic(), world=ranks, microbatches=5, noise_every=1)
        engine = Quadratic(np, *SIZES)
        engine.parts[1].w.requires_grad = False
        replica = mpidl.DataParallel(
            engine, optim.SGD(0.0), world=ranks, microbatches=5, noise_every=1
        )
        assert replica.microbatches is not None
        mine = replica.microbatches.mine
        ends = [13 * leaf // 5 for leaf in range(6)]
        for x in batches:
            replica.microbatches.expect(13)
            for leaf in mine:
                engine(mpidl.tensor(x[ends[leaf] : ends[leaf + 1]])).backward()
                replica.step()
            if not mine:
                replica.step(0)
            part = x[ends[mine.start] : ends[mine.stop]] if mine else x[:0]
            for xs in model.split(torch.from_numpy(part)):
                model(xs).backward()
        same(model.noise, replica.noise)
        records.append(model.noise.record())
        model.close()
        replica.close()
    assert records[0] == records[1]
    assert records[0] is not None
    assert records[0]["batch"] == 13


def test_half_precision_and_every_other_average(world: mpidl.World, own: Any) -> None:
    """Gradients of half types are averaged in float32."""
    model = mt.DataParallel(TorchQuadratic(torch.bfloat16), world=world, noise_every=2)
    full = mt.DataParallel(TorchQuadratic(), world=world, noise_every=2)
    for _ in range(5):
        x = torch.from_numpy(samples(own, 4)).bfloat16()
        model(x).backward()
        full(x.double()).backward()
        model.zero_grad()
        full.zero_grad()
    assert model.noise.estimates == (0 if world.size == 1 else 3)
    same(model.noise, full.noise, rtol=0.1)
    model.close()
    full.close()


def test_what_cannot_be(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match="noise_every=-1"):
        mt.DataParallel(TorchQuadratic(), world=world, noise_every=-1)
    if world.size > 1:
        with pytest.raises(RankMismatch, match="noise_every"):
            mt.DataParallel(TorchQuadratic(), world=world, noise_every=1 + world.rank)
