"""The gradient noise scale: against its formula, and where the true one is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import mpidl
from mpidl import data, nn, optim
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, NonFiniteGradient
from mpidl.overlap import WATCHED
from mpidl.strategies import ParameterServer
from tests.ranks.conftest import DEVICE, PLACEMENTS, STRATEGIES, as_nodes

Floats = npt.NDArray[np.float64]

SIZES = (17, 4, 301)  # of the parameters, the second of which is frozen
TRAINED = np.r_[0:17, 21:322]
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="in host memory only")
MEANS = [name for name in STRATEGIES if name != "adasum"]


class Quadratic(nn.Module):
    """Mean over samples of |w - x|^2 / 2, whose gradient is w minus the mean of x; w is 0."""

    def __init__(self, xp: Any, *sizes: int) -> None:
        self.parts = [Vector(xp, size) for size in sizes]

    def forward(self, x: Any) -> Any:
        """Return the loss of samples `x` (rows, size)."""
        loss, start = 0.0, 0
        for part in self.parts:
            end = start + part.w.size
            loss = loss + ((part.w - x[:, start:end]) ** 2).sum() * (0.5 / len(x))
            start = end
        return loss


class Vector(nn.Module):
    def __init__(self, xp: Any, size: int) -> None:
        self.w = nn.Parameter(xp.zeros(size))


def estimate(sizes: list[int], means: list[Floats]) -> tuple[float, float]:
    """Return tr(Sigma) and |G|^2 of mean gradients of so many samples, as for groups of samples.

    An analysis of variance: the sum of squares between n groups is (n - 1) tr(Sigma) on average.
    """
    b = np.array(sizes, float)
    g = np.array(means)[b > 0]
    b = b[b > 0]
    mean = b @ g / b.sum()
    trace = float((b * ((g - mean) ** 2).sum(1)).sum() / (len(b) - 1))
    return trace, float(mean @ mean) - trace / float(b.sum())


def averaged(estimates: list[tuple[float, float]]) -> Floats:
    """Return what the estimates, fewer than 100, come to: the k-th counts k times."""
    return np.average(estimates, axis=0, weights=np.arange(len(estimates)) + 1)


def check(noise: Any, estimates: list[tuple[float, float]], rtol: float = 1e-9) -> None:
    trace, squared_norm = averaged(estimates)
    assert noise.estimates == len(estimates)
    np.testing.assert_allclose(noise.trace, trace, rtol=rtol)
    np.testing.assert_allclose(noise.squared_norm, squared_norm, rtol=rtol, atol=rtol * trace)


def samples(rng: np.random.Generator, rows: int, size: int = sum(SIZES)) -> Floats:
    return rng.standard_normal((rows, size)) + 0.3


def gathered(world: mpidl.World, parts: list[Floats]) -> tuple[list[int], list[Floats]]:
    """Return the samples of all ranks' parts, and the gradients of what trains."""
    found = [part for of_rank in world.gather(parts) for part in of_rank if len(part)]
    return [len(x) for x in found], [-x.mean(0)[TRAINED] for x in found]


def replica(world: mpidl.World, xp: Any, *args: Any, **options: Any) -> mpidl.DataParallel:
    model = Quadratic(xp, *SIZES)
    model.parts[1].w.requires_grad = False
    options = {"noise_every": 1, "overlap": False, "bucket_bytes": 900, **options}
    return mpidl.DataParallel(model, optim.SGD(0.0), *args, world=world, **options)


def step(made: Any, x: Floats, xp: Any) -> None:
    if len(x):
        made.model(mpidl.tensor(xp.asarray(x))).backward()
    made.step(len(x))


def rows_of(world: mpidl.World, own: np.random.Generator, number: int) -> int:
    """Return how many samples: at times the last rank has none, unless it is alone."""
    empty = number % 3 == 0 and 0 < world.rank == world.size - 1
    return 0 if empty else int(own.integers(1, 9))


BOTH = {"clip_norm": 0.1, "clip_value": 0.1}


@pytest.mark.parametrize(
    ("accumulate", "clip"),
    [(1, {}), (3, {}), (1, {"clip_norm": 0.01}), (3, {"clip_value": 0.02}), (1, BOTH)],
    ids=str,
)
@pytest.mark.parametrize("strategy", MEANS)
def test_it_is_the_formula(
    strategy: str, clip: Any, accumulate: int, world: mpidl.World, own: Any, xp: Any
) -> None:
    """Before clipping, for parts of any size; ranks without samples are none."""
    made = replica(world, xp, strategy, accumulate=accumulate, check_finite=True, **clip)
    estimates = []
    for number in range(4):
        parts = [samples(own, rows_of(world, own, number + k)) for k in range(accumulate)]
        for x in parts:
            step(made, x, xp)
        sizes, means = gathered(world, parts)
        if len(sizes) > 1:
            estimates.append(estimate(sizes, means))
            batch = sum(sizes)
            assert made.noise.batch >= batch
    if not estimates:
        assert world.size * accumulate == 1
        assert made.noise.record() is None
    else:
        check(made.noise, estimates)
        assert len(set(world.gather(str(made.noise.record())))) == 1
    made.close()


@on_cpu
@pytest.mark.parametrize("clip", [{}, BOTH], ids=str)
@pytest.mark.parametrize("strategy", MEANS)
def test_overlap(strategy: str, clip: Any, world: mpidl.World, own: Any, xp: Any) -> None:
    """The thread averages in place, group by group, while backward makes others."""
    made = replica(world, xp, strategy, overlap=True, **clip)
    estimates = []
    for number in range(WATCHED + 5):
        if number == WATCHED + 2:  # a step that fails when all are averaged
            made.model(mpidl.tensor(xp.asarray(samples(own, 4)))).backward()
            with pytest.raises(InvalidArgument, match="samples were counted"):
                made.step(3)
            made._forget()
        x = samples(own, rows_of(world, own, number))
        step(made, x, xp)
        sizes, means = gathered(world, [x])
        if len(sizes) > 1:
            estimates.append(estimate(sizes, means))
    assert made._overlap is not None
    assert made._overlap.active
    if estimates:
        check(made.noise, estimates)
    made.close()


@on_cpu
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nodes_and_local_steps(placement: str, world: mpidl.World, own: Any, xp: Any) -> None:
    """With local steps the ranks that share parameters are those whose gradients are averaged."""
    nodes = as_nodes(world, PLACEMENTS[placement])
    for local_steps in (1, 2):
        made = replica(nodes, xp, "hierarchical", local_steps=local_steps)
        group = nodes if local_steps == 1 else nodes.on_node()
        estimates = []
        for _ in range(3):
            x = samples(own, int(own.integers(1, 9)))
            step(made, x, xp)
            sizes, means = gathered(group, [x])
            if len(sizes) > 1:
                estimates.append(estimate(sizes, means))
        if estimates:
            check(made.noise, estimates)
        else:
            assert made.noise.record() is None
        made.close()


@on_cpu
@pytest.mark.parametrize("codec", [None, "fp16", "bf16", "int8"])
def test_codecs(codec: str | None, world: mpidl.World, own: Any, xp: Any) -> None:
    """What comes out is the mean, nearly."""
    nodes = as_nodes(world, lambda rank: rank)
    for strategy in ("hierarchical", "ring"):
        made = replica(nodes, xp, strategy, codec=codec)
        estimates = []
        for _ in range(3):
            x = samples(own, int(own.integers(4, 9)))
            step(made, x, xp)
            sizes, means = gathered(nodes, [x])
            if len(sizes) > 1:
                estimates.append(estimate(sizes, means))
        if estimates:
            check(made.noise, estimates, rtol=1e-9 if codec is None else 0.01)
        made.close()


@on_cpu
def test_microbatches_are_the_parts(world: mpidl.World, rng: Any, xp: Any) -> None:
    """On any number of ranks: the same bits."""
    sizes = [int(rng.integers(5)) for _ in range(3)] + [3, 1]
    batches = [[samples(rng, rows) for rows in rng.permutation(sizes)] for _ in range(3)]
    records = []
    for ranks in (world, world.alone()):
        made = replica(ranks, xp, microbatches=5, bucket_bytes="auto")
        assert made.microbatches is not None
        for parts in batches:
            for leaf in made.microbatches.mine:
                step(made, parts[leaf], xp)
            if not made.microbatches.mine:
                made.step(0)
        check(
            made.noise,
            [
                estimate([len(x) for x in p], [-x.sum(0)[TRAINED] / max(len(x), 1) for x in p])
                for p in batches
            ],
        )
        records.append(made.noise.record())
        made.close()
    assert records[0] == records[1]


@pytest.mark.parametrize("every", [0, 1, 3])
def test_one_in_so_many_updates(every: int, world: mpidl.World, own: Any, xp: Any) -> None:
    """The others take no part in it: they make as many collective calls as without."""
    made, plain = (replica(world, xp, "allreduce", noise_every=n) for n in (every, 0))
    calls = []
    for number in range(7):
        before = world.mark.calls
        step(plain, samples(own, 2), xp)
        between = world.mark.calls
        step(made, samples(own, 2), xp)
        if not every or number % every:
            assert world.mark.calls - between == between - before
        calls.append(made.noise.estimates)
    due = [number for number in range(7) if every and number % every == 0]
    assert calls == [sum(d <= number for d in due) * (world.size > 1) for number in range(7)]
    assert plain.noise.record() is None
    made.close()
    plain.close()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_no_number_and_what_fails_is_left_out(
    accumulate: int, world: mpidl.World, own: Any, xp: Any
) -> None:
    made = replica(world, xp, "allreduce", accumulate=accumulate, check_finite=True)
    last, estimates = world.rank == world.size - 1, []
    for what in ("", "overflow", "error", ""):
        parts = [samples(own, 2) for _ in range(accumulate)]
        factor = {"overflow": 1e160, "error": math.nan}.get(what, 1.0) if last else 1.0
        try:
            with np.errstate(all="ignore"):  # of the loss
                for x in parts:
                    step(made, x * factor, xp)
        except NonFiniteGradient:
            assert what == "error"
            made.zero_grad()
        sizes, means = gathered(world, parts)
        if not what and len(sizes) > 1:
            estimates.append(estimate(sizes, means))
    assert made.steps == 3
    if estimates:
        check(made.noise, estimates)
    assert made.noise.estimates == len(estimates)
    made.close()


@on_cpu
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("adasum", {}),
        ("hierarchical", {"codec": "topk"}),
        ("hierarchical", {"codec": "powersgd"}),
        ("allreduce", {"local_steps": 2}),
        (None, {}),
    ],
)
def test_where_nothing_can_be_said(
    strategy: Any, options: Any, world: mpidl.World, own: Any, xp: Any
) -> None:
    nodes = as_nodes(world, lambda rank: rank)
    kind = strategy or ParameterServer(nodes, asynchronous=True)
    made = replica(nodes, xp, kind, **options)
    for _ in range(3):
        step(made, samples(own, 2), xp)
    assert made.noise.record() is None
    assert made.noise.advice() == []
    made.close()
    world.barrier()


@on_cpu
@pytest.mark.parametrize(
    "options", [{}, {"overlap": True}, {"accumulate": 3}, {"microbatches": 4}], ids=str
)
def test_a_quadratic_whose_noise_is_known(
    options: Any, world: mpidl.World, rng: Any, own: Any, xp: Any
) -> None:
    """Within 10 % of the truth, which is more than five standard deviations."""
    size, steps, true = 700, 99, 20.0  # samples
    variances = rng.uniform(0.5, 1.5, size) / size * true
    mu = rng.standard_normal(size)
    mu /= np.linalg.norm(mu)
    true = float(variances.sum())
    model = Quadratic(xp, size)
    options = {"overlap": False, **options}
    made = mpidl.DataParallel(model, optim.SGD(0.0), world=world, noise_every=1, **options)
    mine = range(options.get("accumulate", 1))
    if made.microbatches is not None:
        mine = made.microbatches.mine
    for _ in range(steps):
        for part in mine:
            x = own.standard_normal(((8, 12, 7, 9)[(world.rank + part) % 4], size))
            step(made, mu + x * np.sqrt(variances), xp)
        if not mine:
            made.step(0)
    noise = made.noise
    n = {"accumulate": 3 * world.size, "microbatches": 4}.get([*options][-1], world.size)
    if n == 1:
        assert noise.record() is None
        made.close()
        return
    # (n - 1) estimates of the trace are sums of squares of normal numbers; |G|^2 is one more
    fourth, b = float((variances**2).sum()), noise.batch
    count = (steps * (steps + 1) / 2) ** 2 / (steps * (steps + 1) * (2 * steps + 1) / 6)
    deviation = math.sqrt(2 * fourth / (n - 1)) / true
    norms = 2 * fourth / b**2 * n / (n - 1) + 4 * float(variances @ mu**2) / b
    sigma = (deviation + math.sqrt(norms)) / math.sqrt(count)
    assert 5 * sigma < 0.1
    assert noise.estimates == steps
    np.testing.assert_allclose(noise.trace, true, rtol=0.1)
    np.testing.assert_allclose(noise.squared_norm, 1, rtol=0.1)
    np.testing.assert_allclose(noise.scale, true, rtol=0.1)
    made.close()


@on_cpu
def test_a_trainer_has_it(
    world: mpidl.World, rng: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its run folder, too, and in the last lines that it shows."""
    x = rng.standard_normal((24 * world.size, 5)).astype(np.float32)
    trainer = mpidl.Trainer(
        nn.Linear(5, 2), nn.mse, optim.SGD(0.1), world=world, out=tmp_path, noise_every=2
    )
    trainer.fit(data.ArrayDataset(x, x[:, :2]), 1, 8 * world.size)
    record = trainer.replica.noise.record()
    shown = capfd.readouterr().err
    if world.rank == 0:
        (line,) = (x for x in (tmp_path / "metrics.jsonl").read_text().splitlines() if "epoch" in x)
        for written in (line, (tmp_path / "summary.json").read_text()):
            found = json.loads(written)["noise"]  # rounded
            assert (found is None) == (record is None)
            for name, value in (record or {}).items():
                np.testing.assert_allclose(float(found[name]), float(value), rtol=1e-3)
        assert (trainer.replica.noise.advice() or ["steps in"])[0] in shown
    assert (record is None) == (world.size == 1)
    if record is not None:
        assert record["batch"] == 8 * world.size
        assert record["estimates"] == 2
        assert float(record["scale"]) in (record["trace"] / record["squared_norm"], math.inf)
    trainer.close()


@pytest.mark.parametrize("every", [-1, 0.5, None])
def test_what_cannot_be(every: Any, world: mpidl.World, xp: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"noise_every={every}"):
        replica(world, xp, "allreduce", noise_every=every)


def test_the_model_is_what_it_says(world: mpidl.World, own: Any, xp: Any) -> None:
    model = Quadratic(xp, *SIZES)
    x = samples(own, 5)
    model(mpidl.tensor(xp.asarray(x))).backward()
    found = np.concatenate([to_numpy(p.grad) for p in model.parameters()])
    np.testing.assert_allclose(found, -x.mean(0), rtol=1e-12)
