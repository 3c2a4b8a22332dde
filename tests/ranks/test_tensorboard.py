"""`Trainer(tensorboard=True)`: what is read back is what the run folder tells, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import data, nn, optim, tensorboard
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.optim import schedules
from tests import events
from tests.ranks.conftest import DEVICE

pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install 'mpidl[report]'")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the same on a GPU")

Rng = np.random.Generator
SAMPLES, BATCH = 22, 8
CYCLE = schedules.triangular(0.1, 0.5, half=3)


class Net(nn.Module):
    def __init__(self) -> None:
        self.body = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        self.heads = {"a*": nn.Linear(4, 3), "frozen": nn.Linear(3, 3)}
        for parameter in self.heads["frozen"].parameters():
            parameter.requires_grad = False

    def forward(self, x: Any) -> mpidl.Tensor:
        y = self.heads["a*"](self.body(x) * 2.0)
        return self.heads["frozen"](y) + y


@pytest.fixture
def folder(world: mpidl.World, tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(world.broadcast(str(tmp_path)))


def dataset(rng: Rng) -> data.ArrayDataset:
    return data.ArrayDataset(rng.standard_normal((SAMPLES, 5), np.float32), np.arange(SAMPLES) % 3)


def trainer(folder: Path, **options: Any) -> mpidl.Trainer:
    nn.seed(3)
    groups = {"body.*": optim.SGD(CYCLE, momentum=0.5), "*": optim.AdamW(1e-3)}
    return mpidl.Trainer(
        Net(), nn.cross_entropy, groups, out=folder, tensorboard=True, quiet=True, **options
    )


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_numbers_are_those_of_the_run_folder(world: mpidl.World, folder: Path, rng: Rng) -> None:
    made, samples = trainer(folder), dataset(rng)
    first: dict[str, Any] = {}
    for name, parameter in made.model.named_parameters().items():
        if parameter.requires_grad:
            keep = lambda p, name=name: first.setdefault(name, p.grad.copy())  # noqa: E731
            parameter.on_gradient(keep)
    history = made.fit(samples, 2, BATCH, evaluate=samples)
    made.tensorboard.add_scalar("mine/rank", float(world.rank), history[-1].steps)
    assert (made.tensorboard.writer is None) == bool(world.rank)
    made.close()
    world.barrier()
    if world.rank:
        return
    files = events.read(folder / "tensorboard")
    assert len(files) == 1
    found = events.shown(files)
    lines = [line for line in records(folder) if line.get("kind", "epoch") == "epoch"]
    assert [line["steps"] for line in lines] == [3, 6] == [e.steps for e in history]
    names = {"loss/epoch": "loss", "samples_per_second/epoch": "samples_per_second"}
    for tag, name in names.items():
        assert found[tag] == pytest.approx({line["steps"]: line[name] for line in lines})
    for name in ("loss", "accuracy"):
        wanted = {line["steps"]: line["metrics"][name] for line in lines}
        assert found[f"test/{name}"] == pytest.approx(wanted)
    rates = found["learning_rate/body.all"]
    assert {step: rates[step] for step in (3, 6)} == pytest.approx({3: CYCLE(2), 6: CYCLE(5)})
    assert found["learning_rate/all"][6] == pytest.approx(1e-3)
    assert found["mine/rank"] == {6: 0.0}

    for name, parameter in made.model.named_parameters().items():
        tag, values = name.replace("*", "_"), parameter.data.astype(np.float64)
        same(found[f"parameters/{tag}"][6], values)
        if name in first:
            assert set(found[f"gradients/{tag}"]) == {1, 4}  # the first step of each epoch
            same(found[f"gradients/{tag}"][1], first[name])
        else:
            assert f"gradients/{tag}" not in found


def same(histogram: Any, values: Any) -> None:
    assert histogram.num == values.size == sum(histogram.bucket)
    wanted = [values.min(), values.max(), values.sum(), (values**2).sum()]
    told = [histogram.min, histogram.max, histogram.sum, histogram.sum_squares]
    np.testing.assert_allclose(told, wanted, rtol=1e-5, atol=1e-6)


def test_the_graph_has_boxes_of_layers(world: mpidl.World, folder: Path, rng: Rng) -> None:
    made = trainer(folder)
    loss, hooks = made.loss, [m._output_hooks for m in made.model.modules()]
    made.fit(dataset(rng), 1, BATCH)
    assert made.loss is loss
    assert [m._output_hooks for m in made.model.modules()] == hooks
    made.close()
    world.barrier()
    if world.rank:
        return
    nodes = events.graph(events.read(folder / "tensorboard"))
    inputs = {name: list(node.input) for name, node in nodes.items()}
    body, head = "Net/body/0", "Net/heads/a_"
    assert inputs == {
        f"{body}/weight": [],
        f"{body}/bias": [],
        f"{body}/linear": [f"{body}/weight", f"{body}/bias"],
        "Net/body/1/relu": [f"{body}/linear"],
        f"{head}/weight": [],
        f"{head}/bias": [],
        "Net/multiply": ["Net/body/1/relu"],
        f"{head}/linear": ["Net/multiply", f"{head}/weight", f"{head}/bias"],
        "Net/heads/frozen/linear": [f"{head}/linear"],
        "Net/add": ["Net/heads/frozen/linear", f"{head}/linear"],
        "loss/cross_entropy": ["Net/add"],
    }
    (shape,) = nodes[f"{head}/weight"].attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [3, 4]
    assert nodes[f"{head}/weight"].attr["dtype"].s == b"float32"


def test_a_run_goes_on_where_it_was(world: mpidl.World, folder: Path, rng: Rng) -> None:
    samples, checkpoints = dataset(rng), folder / "checkpoints"
    made = trainer(folder, checkpoint=checkpoints)
    made.fit(samples, 1, BATCH)
    made.close()
    lost = trainer(folder, checkpoint=checkpoints, resume="auto")  # writes, and saves nothing
    lost.saver = None
    lost.fit(samples, 2, BATCH)
    lost.tensorboard.add_scalar("mine/late", 1.0, 99)
    lost.close()
    again = trainer(folder, checkpoint=checkpoints)
    history = again.fit(samples, 3, BATCH)
    again.close()
    world.barrier()
    if world.rank:
        return
    files = events.read(folder / "tensorboard")
    starts = [[e.step for e in f if e.HasField("session_log")] for f in files]
    assert starts == [[], [4], [4]]
    found = events.shown(files)
    assert found["loss/epoch"] == pytest.approx({e.steps: e.loss for e in history})
    assert list(found["loss/epoch"]) == [3, 6, 9] and found["mine/late"] == {}


def test_what_the_contract_has_more_of(world: mpidl.World, folder: Path) -> None:
    made = trainer(folder)
    (write,) = made.tensorboard.follow()
    write({"kind": "steps", "step": 2, "loss": "nan", "samples_per_second": 8.0, "time": 1.5e9})
    write({"kind": "epoch", "epoch": 1, "steps": 3, "loss": 1.5, "metrics": {}, "noise": None})
    made.close()
    if world.rank == 0:
        ((*_,),) = files = events.read(folder / "tensorboard")
        found = events.shown(files)
        assert list(found["loss/steps"]) == [2] and np.isnan(found["loss/steps"][2])
        assert found["loss/epoch"] == {3: 1.5} and found["samples_per_second/steps"] == {2: 8.0}
        times = {e.step: e.wall_time for e in files[0] if e.summary.value}
        assert times[2] == 1.5e9


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_is_told_of(world: mpidl.World, folder: Path) -> None:
    """tensorboardX writes in a thread, and whoever waits for a dead one's queue waits for ever."""
    made = trainer(folder)
    (write,) = made.tensorboard.follow()
    if world.rank == 0:
        events_writer = made.tensorboard.writer.file_writer.event_writer

        def fail(_: Any) -> None:
            raise OSError("no space left")

        events_writer._ev_writer.write_event = fail
        write({"steps": 1, "loss": 1.0, "metrics": {}})
        events_writer._worker.join(20)
        with pytest.raises(MpidlError, match="can be written no more"):
            write({"steps": 2, "loss": 1.0, "metrics": {}})
    made.close()


def test_without_it_all_ranks_are_silent(world: mpidl.World, folder: Path, rng: Rng) -> None:
    made = mpidl.Trainer(Net(), nn.cross_entropy, optim.SGD(0.1), out=folder, quiet=True)
    made.fit(dataset(rng), 1, BATCH)
    made.tensorboard.add_image("mine", np.zeros((3, 2, 2)))
    made.tensorboard.flush()
    with pytest.raises(AttributeError, match="begins with add_"):
        made.tensorboard.ad_image  # noqa: B018
    made.close()
    world.barrier()
    assert not (folder / "tensorboard").exists()


def test_what_is_wrong_is_told_on_every_rank(
    world: mpidl.World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = world.rank == world.size - 1
    for asked, out, message in (
        (True, None, "tensorboard=True: expected out"),
        ("yes" if last else True, folder, "tensorboard='yes': expected True or False"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            mpidl.Trainer(Net(), nn.mse, optim.SGD(0.1), out=out, tensorboard=asked)  # type: ignore[arg-type]
    if last:
        monkeypatch.setattr(tensorboard, "find_spec", lambda _: None)
    with pytest.raises(MpidlError, match=r"pip install 'mpidl\[report\]'"):
        trainer(folder)
    monkeypatch.undo()
    world.barrier()
    made = trainer(folder)
    if world.rank == 0:
        (folder / "tensorboard").write_text("")
    with pytest.raises(InvalidArgument, match=r"cannot write .*tensorboard"):
        made.fit(data.ArrayDataset(np.ones((4, 5), np.float32), np.arange(4) % 3), 1, 4)
    made.close()
