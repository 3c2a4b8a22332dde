"""`mpidl run --trace`: whole jobs, and what their traces tell."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mpidl.trace import analysis, load
from tests import job
from tests.unit.test_trace import check_nesting

TRAIN = """
import os, signal, sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

slow, killed = int(sys.argv[1]), sys.argv[2:] == ["kill"]
world = mpidl.init()
pid = os.fork()
if not pid:  # a child is no rank
    with mpidl.range("child"):
        os._exit(0)
os.waitpid(pid, 0)

@mpidl.range("augment")
def augment(x):
    time.sleep(0.002 + 0.02 * (world.rank == slow))
    return x

class Model(nn.Module):
    def __init__(self):
        self.layer, self.calls = nn.Linear(8, 3), 0
    def forward(self, x):
        self.calls += 1
        if killed and world.rank == slow and self.calls == 12:
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(augment(x))

nn.seed(0)
x = np.random.default_rng(0).standard_normal((64, 8)).astype("f")
samples = data.ArrayDataset(x, np.arange(64) % 3)
begin = time.perf_counter()
trainer = mpidl.Trainer(Model(), nn.cross_entropy, optim.SGD(0.1), quiet=True)
trainer.fit(samples, 2, 8)
trainer.close()
if world.rank == 0:
    print(time.perf_counter() - begin)
"""

TORCH = """
import sys, time
import torch, mpidl
from mpidl.torch import DataParallel

world = mpidl.init()
torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(module.parameters(), 0.1)
model = DataParallel(module, optimizer, sys.argv[1])
for _ in range(6):
    optimizer.zero_grad()
    with mpidl.range("load"):
        time.sleep(0.02 * (world.rank == 1))
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
"""


def run(folder: Path, ranks: int, *command: str, mpi: str = "openmpi", **extra: str) -> job.Result:
    return job.run(mpi, ranks, "--trace-file", str(folder / "t.json"), *command, **extra)  # type: ignore[arg-type]


def trace(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "t.json").read_text())  # type: ignore[no-any-return]


def summary(folder: Path) -> dict[str, Any]:
    return analysis.report(load.load(folder / "t.json")[0], 3)


def of(events: list[dict[str, Any]], pid: int, kind: str) -> list[dict[str, Any]]:
    found = [e for e in events if e["ph"] == "X" and e["pid"] == pid and e["cat"] == kind]
    return sorted(found, key=lambda event: event["ts"])


def test_a_training_and_its_straggler(tmp_path: Path) -> None:
    result = run(tmp_path, 3, job.script(tmp_path, TRAIN), "2")
    assert (result.status, result.errors) == (0, ""), result
    assert [p.name for p in tmp_path.glob("t.json*")] == ["t.json"]
    told = trace(tmp_path)
    events = told["traceEvents"]
    assert told["otherData"]["notes"] == []
    check_nesting(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [name.split(" on ")[0] for name in names.values()] == ["rank 0", "rank 1", "rank 2"]
    for rank in range(3):
        phases, steps = of(events, rank, "phase"), of(events, rank, "step")
        assert [e["args"]["step"] for e in steps] == list(range(16))
        assert all(e["args"]["bytes"] > 0 for e in steps)
        ranges = of(events, rank, "range")
        assert [e["name"] for e in ranges] == ["augment"] * 16
        # phases follow one another, from the start to the end
        (end,) = [e["ts"] for e in events if e["ph"] == "i" and e["pid"] == rank]
        whole = end - phases[0]["ts"]
        assert sum(e["dur"] for e in phases) == pytest.approx(whole, rel=0.01)
        assert whole > 1e6 * float(result.output.split()[-1]) * 0.99
        split = [e for e in phases if "reduce" in e["args"]]
        assert split and all(
            sum(e["args"].get(name, 0) for name in ("compute", "wait", "reduce", "update"))
            == pytest.approx(e["dur"] / 1e6, rel=0.01) for e in split
        )  # fmt: skip
    found = summary(tmp_path)["totals"]
    assert found["steps"] == 16
    assert found["stragglers"][0]["rank"].startswith("rank 2")
    assert next(iter(found["causes"])) == "range augment"
    assert found["path"]["compute"]["share"] > 0.5
    (named,) = found["ranges"]
    assert (named["name"], named["calls"]) == ("augment", 48)


def test_a_rank_that_is_killed_leaves_a_trace(tmp_path: Path) -> None:
    result = run(tmp_path, 2, job.script(tmp_path, TRAIN), "1", "kill")
    assert result.status != 0
    assert "mpidl: trace: ranks 0, 1: without an end" in result.errors, result
    events = trace(tmp_path)["traceEvents"]
    check_nesting(events)
    for rank in range(2):
        assert [e["args"]["step"] for e in of(events, rank, "step")][:11] == list(range(11))
    assert summary(tmp_path)["totals"]["stragglers"][0]["rank"].startswith("rank 1")


@pytest.mark.soak  # tests/peers/test_torch_trace.py sees the same in a job that is there anyway
@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_a_torch_script(tmp_path: Path) -> None:
    """Under MPICH, whose launcher is not asked how the job ended, and with plain MPIDL_TRACE."""
    path = str(tmp_path / "t.json")
    line = (job.script(tmp_path, TORCH), "hierarchical")
    result = job.run("mpich", 2, *line, MPIDL_TRACE=path)
    assert (result.status, result.errors) == (0, ""), result
    events = trace(tmp_path)["traceEvents"]
    check_nesting(events)
    for rank in range(2):
        assert len(of(events, rank, "step")) == 6
        names = {e["name"] for e in of(events, rank, "phase")}
        assert {"compute", "data", "wait", "reduce", "update"} <= names
    found = summary(tmp_path)["totals"]
    assert found["stragglers"][0]["rank"].startswith("rank 1")
    assert next(iter(found["causes"])) == "range load"


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    script = job.script(tmp_path, "import mpidl; mpidl.init(); print('done')")
    path = str(tmp_path / "file" / "t.json")
    result = job.execute("openmpi", sys.executable, script, MPIDL_TRACE=path)
    assert (result.status, result.output) == (0, "done\n"), result
    assert "nothing is recorded there" in result.errors and len(result.errors.splitlines()) == 1
