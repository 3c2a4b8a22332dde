"""The training loop, and the batches it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import clock, data, nn, optim
from mpidl.array import to_numpy
from mpidl.errors import BatchTooLarge, InvalidArgument, RankMismatch
from tests import job
from tests.ranks.conftest import STRATEGIES
from tests.ranks.test_parallel import DEVICE_OF, make_data, make_model, train_alone, weights_of


def fit(
    train: data.ArrayDataset, xp: Any, strategy: str = "allreduce", **options: Any
) -> tuple[list[mpidl.Epoch], nn.Module, mpidl.Trainer]:
    model = make_model("float64", 7, xp)
    optimizer = optim.SGD(lr=0.2, momentum=0.9)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optimizer, strategy, quiet=True, **options)
    history = trainer.fit(train, epochs=2, batch_size=10, evaluate=train, seed=3)
    return history, model, trainer


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fit_equals_one_process(
    strategy: str, world: mpidl.World, rng: np.random.Generator, xp: Any
) -> None:
    train = make_data(rng, 47, "float64")
    alone = make_model("float64", 7)
    train_alone(alone, train, 10, steps=10)
    history, model, trainer = fit(train, xp, strategy)
    np.testing.assert_allclose(weights_of(model), weights_of(alone), rtol=1e-11, atol=1e-12)

    output = alone(train.x)
    assert history[-1].metrics["loss"] == pytest.approx(
        float(nn.cross_entropy(output, train.y)), rel=1e-10
    )
    assert history[-1].metrics["accuracy"] == pytest.approx(nn.accuracy(output, train.y))
    assert [epoch.steps for epoch in history] == [5, 10]
    assert trainer.device == DEVICE_OF[xp.__name__]
    timeless = [replace(e, samples_per_second=0.0, seconds=0.0) for e in history]
    assert all(other == timeless for other in world.gather(timeless))


def test_loss_is_the_mean_over_all_samples(
    world: mpidl.World, rng: np.random.Generator, xp: Any
) -> None:
    """With a rate of 0 the loss of the epoch is that of the whole data set, uneven parts or not."""
    train = make_data(rng, 23, "float64")
    model = make_model("float64", 7, xp)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optim.SGD(lr=0.0), quiet=True)
    (epoch,) = trainer.fit(train, epochs=1, batch_size=7)
    whole = float(nn.cross_entropy(make_model("float64", 7)(train.x), train.y))
    assert epoch.loss == pytest.approx(whole, rel=1e-12)
    assert epoch.metrics == {}


def test_metrics_of_ones_own(world: mpidl.World, rng: np.random.Generator, xp: Any) -> None:
    train = make_data(rng, 23, "float64")
    history, _, _ = fit(train, xp, metrics={"label": lambda _, y: float(y.sum()) / max(1, len(y))})
    assert history[0].metrics["label"] == pytest.approx(train.y.mean())
    assert "accuracy" not in history[0].metrics


def test_metrics_may_be_tensors(world: mpidl.World, rng: np.random.Generator, xp: Any) -> None:
    """Those of one element, as the losses return; in the history they are plain numbers."""
    x, y = rng.standard_normal((23, 5)), rng.standard_normal((23, 3))
    model = make_model("float64", 7, xp)
    metrics = {"l1": nn.l1, "column": lambda output, y: nn.l1(output, y).reshape(1, 1)}
    trainer = mpidl.Trainer(model, nn.mse, optim.SGD(lr=0.0), metrics=metrics, quiet=True)
    found = trainer.evaluate(data.ArrayDataset(x, y), batch_size=7)
    expected = np.abs(to_numpy(make_model("float64", 7)(x).data) - y).mean()
    assert found["l1"] == pytest.approx(expected, rel=1e-12)
    assert found["column"] == pytest.approx(expected, rel=1e-12)
    assert {type(value) for value in found.values()} == {float}


def test_binary_accuracy_as_metric(world: mpidl.World, rng: np.random.Generator, xp: Any) -> None:
    x, y = rng.standard_normal((23, 5)), rng.integers(0, 2, 23)
    nn.seed(7)
    model = nn.Linear(5, 1).astype("float64").to(DEVICE_OF[xp.__name__])
    expected = sum((logit > 0) == t for (logit,), t in zip(model.predict(x), y, strict=True)) / 23

    def loss(logits: mpidl.Tensor, target: Any) -> mpidl.Tensor:
        return nn.binary_cross_entropy(logits.reshape(-1), target.astype(float))

    trainer = mpidl.Trainer(
        model, loss, optim.SGD(lr=0.0), metrics={"share": nn.binary_accuracy}, quiet=True
    )
    found = trainer.evaluate(data.ArrayDataset(x, y), batch_size=7)
    assert found["share"] == pytest.approx(expected, rel=1e-12)


def test_a_metric_may_not_be_called_loss(world: mpidl.World) -> None:
    """It would take the place of the loss."""
    metrics = {"loss" if world.rank == world.size - 1 else "l1": nn.l1}
    with pytest.raises(InvalidArgument, match=rf'rank {world.size - 1}: metrics: "loss" is the'):
        mpidl.Trainer(make_model("float64", 7), nn.mse, optim.SGD(lr=0.1), metrics=metrics)


def test_run_folder(world: mpidl.World, rng: np.random.Generator, tmp_path: Path, xp: Any) -> None:
    folder = world.broadcast(tmp_path / "new" / "run")
    history, _, _ = fit(make_data(rng, 30, "float64"), xp, out=folder, settings={"note": "mine"})
    world.barrier()
    epochs = job.epochs(folder)
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert epochs[-1]["loss"] == history[-1].loss
    for epoch in epochs:
        assert set(epoch["phases"]) == set(clock.PHASES)
        spent = np.array([epoch["phases"][name] for name in clock.PHASES]).sum(axis=0)
        assert spent.shape == (world.size,)
        assert spent.max() == pytest.approx(epoch["seconds"], rel=0.05, abs=0.01)
        assert min(epoch["phases"]["compute"]) > 0
        assert min(epoch["peak_memory_bytes"]) > 1 << 20
        assert (sum(epoch["moved_bytes"]) > 0) == (world.size > 1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "steps"]
    assert sum(line["count"] for line in steps) == steps[-1]["step"] == history[-1].steps
    times = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    assert [line["first_step"] for line in times] == [0, history[0].steps]
    for line, epoch in zip(times, epochs, strict=True):
        for name in ("compute", "data", "wait", "update"):
            columns = np.array(line["seconds"][name])
            assert columns.shape == (world.size, 3)
            assert columns.sum() <= sum(epoch["phases"][name]) * 1.01
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"]) == (world.size, history[-1].steps)
    assert 0 < summary["efficiency"] <= 1
    config = json.loads((folder / "config.json").read_text())
    assert config["ranks"] == len(config["hosts"]) == world.size
    assert config["optimizer"]["SGD"]["momentum"] == 0.9
    assert (config["seed"], config["batch_size"], config["note"]) == (3, 10, "mine")
    assert config["versions"]["mpidl"] == mpidl.__version__


def test_run_folder_that_cannot_be_written(
    world: mpidl.World, rng: np.random.Generator, tmp_path: Path, xp: Any
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidArgument, match="cannot write the run folder"):
        fit(make_data(rng, 30, "float64"), xp, out=tmp_path / "file")


def test_batch_larger_than_the_data(world: mpidl.World, rng: np.random.Generator, xp: Any) -> None:
    with pytest.raises(BatchTooLarge, match=r"batch_size=10 is larger .* 9 samples"):
        fit(make_data(rng, 9, "float64"), xp)


def test_data_sets_that_differ(world: mpidl.World, rng: np.random.Generator) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    train = make_data(rng, 30 + (world.rank == 1), "float32")
    with pytest.raises(RankMismatch, match=r"rank 1: batches: 31 samples.*rank 0 has 30 samples"):
        data.batches(train, 10, world=world)
    with pytest.raises(InvalidArgument, match="seed=-1"):
        data.batches(train, 10, world=world, seed=-1 if world.rank == 0 else 0)


def test_shards_make_up_the_global_batches(world: mpidl.World, rng: np.random.Generator) -> None:
    n, batch = int(rng.integers(5, 60)), 5
    train = data.ArrayDataset(np.arange(n), np.arange(n))
    alone = [x for x, _ in data.batches(train, batch, world=None, seed=1, epoch=2)]
    mine = [x for x, _ in data.batches(train, batch, world=world, seed=1, epoch=2)]
    shards = world.gather(mine)
    assert {len(shard) for shard in shards} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = [shard[step] for shard in shards]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_negative_epochs(world: mpidl.World, rng: np.random.Generator) -> None:
    trainer = mpidl.Trainer(make_model("float64", 7), nn.cross_entropy, optim.SGD(lr=0.1))
    with pytest.raises(InvalidArgument, match="epochs=-1"):
        trainer.fit(make_data(rng, 30, "float64"), epochs=-1, batch_size=10)
    assert trainer.fit(make_data(rng, 30, "float64"), epochs=0, batch_size=10) == []


def test_means_are_right_where_ranks_are_without_a_sample(world: mpidl.World) -> None:
    """Losses and metrics of one's own are never asked for a mean over nothing."""
    train = data.ArrayDataset(np.ones((9, 2)), np.arange(9.0).reshape(9, 1))
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model.layers[0].weight = nn.Parameter(np.ones((1, 2)))

    def loss(output: mpidl.Tensor, target: np.ndarray) -> mpidl.Tensor:
        return ((output - target) ** 2).sum() / len(target)

    metrics = {"mean": lambda _, y: float(y.sum() / len(y))}
    trainer = mpidl.Trainer(model, loss, optim.SGD(lr=0.0), metrics=metrics, quiet=True)
    (epoch,) = trainer.fit(train, epochs=1, batch_size=4, evaluate=train)
    expected = np.mean((2 - np.arange(9)) ** 2)
    assert epoch.loss == pytest.approx(expected)
    assert epoch.metrics == pytest.approx({"loss": expected, "mean": 4.0})
    trainer.close()


def test_a_second_fit_goes_on(world: mpidl.World, rng: np.random.Generator, tmp_path: Path) -> None:
    train = make_data(rng, 30, "float64")
    once, twice = (
        mpidl.Trainer(model, nn.cross_entropy, optim.SGD(lr=0.2), quiet=True, out=folder)
        for model, folder in (
            (make_model("float64", 7), None),
            (make_model("float64", 7), tmp_path),
        )
    )
    whole = once.fit(train, epochs=3, batch_size=10)
    parts = twice.fit(train, epochs=1, batch_size=10) + twice.fit(train, epochs=2, batch_size=10)
    assert [(e.epoch, e.steps, e.loss) for e in parts] == [
        (e.epoch, e.steps, e.loss) for e in whole
    ]
    if world.rank == 0:
        assert len(job.epochs(tmp_path)) == 3


def test_a_second_run_keeps_the_first_ones_files(
    world: mpidl.World, rng: np.random.Generator, tmp_path: Path, xp: Any
) -> None:
    train = make_data(rng, 30, "float64")
    for note in ("first", "second", "third"):
        fit(train, xp, out=tmp_path if world.rank == 0 else None, settings={"note": note})
    if world.rank == 0:
        names = ("config.json.1", "config.json.2", "config.json")
        notes = [json.loads((tmp_path / name).read_text())["note"] for name in names]
        assert notes == ["first", "second", "third"]
        assert (tmp_path / "metrics.jsonl.2").exists()


@pytest.mark.parametrize("what", ["epochs", "evaluate"])
def test_fits_that_differ(what: str, world: mpidl.World, rng: np.random.Generator) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    train, last = make_data(rng, 30, "float64"), world.rank == world.size - 1
    trainer = mpidl.Trainer(make_model("float64", 7), nn.cross_entropy, optim.SGD(lr=0.1))
    epochs = 2 if last and what == "epochs" else 1
    evaluate = train if last and what == "evaluate" else None
    with pytest.raises(RankMismatch, match=f"fit: .*{what}"):
        trainer.fit(train, epochs=epochs, batch_size=10, evaluate=evaluate)
    with pytest.raises(InvalidArgument, match="epochs=-1"):
        trainer.fit(train, epochs=-1 if last else 1, batch_size=10)


def test_evaluation_leaves_the_mode_as_it_was(world: mpidl.World, rng: np.random.Generator) -> None:
    train = make_data(rng, 30, "float64")

    def broken(*_: Any) -> float:
        raise ZeroDivisionError

    model = make_model("float64", 7)
    trainer = mpidl.Trainer(model, nn.cross_entropy, optim.SGD(lr=0.1), metrics={"bad": broken})
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(train)
        assert model.training is mode
    with pytest.raises(InvalidArgument, match="the data set is empty"):
        trainer.evaluate(make_data(rng, 0, "float64"))


@pytest.mark.parametrize(
    ("asked", "variable"), [(False, "1"), (None, "0"), (True, "0"), (None, "1")]
)
def test_who_is_quiet_says_nothing(
    asked: bool | None,
    variable: str,
    world: mpidl.World,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MPIDL_QUIET", variable)
    loss = nn.cross_entropy
    trainer = mpidl.Trainer(make_model("float64", 7), loss, optim.SGD(lr=0.1), quiet=asked)
    trainer.fit(make_data(rng, 30, "float64"), epochs=1, batch_size=10)
    trainer.close()
    shown = capsys.readouterr().err
    quiet = variable == "1" if asked is None else asked
    assert bool(shown) == (world.rank == 0 and not quiet)
    assert ("ms a step" in shown) == bool(shown)


def test_a_wrong_word_about_quiet_is_told_everywhere(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDL_QUIET", "yes" if world.rank == world.size - 1 else "0")
    with pytest.raises(InvalidArgument, match="MPIDL_QUIET='yes': expected one of 0, 1"):
        mpidl.Trainer(make_model("float64", 7), nn.mse, optim.SGD(lr=0.1))
