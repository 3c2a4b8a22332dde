"""Ranks that are killed while PyTorch trains: the others go on, to the same bits."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests import job
from tests.conftest import SEED

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")

START = """
import copy, hashlib, json, os, sys
import torch
import mpidl.torch as hvd
from torch.nn.functional import cross_entropy

hvd.init()
torch.set_num_threads(1)
rank, made, resets = hvd.rank(), 0, []
kills = set(sys.argv[2:])
torch.manual_seed(int(sys.argv[1]))
x, y = torch.randn(300, 20), torch.randint(0, 4, (300,))


def at(where):
    if f"{rank}:{made}:{where}" in kills:
        os.kill(os.getpid(), 9)


def tell(*numbers):
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    if hvd.rank() == 0:
        print(json.dumps([[digest.hexdigest(), *numbers], hvd.size(), resets]))


"""
SAME_BITS = (
    START
    + """
module = torch.nn.Sequential(
    *(torch.nn.Linear(20, 1500), torch.nn.BatchNorm1d(1500), torch.nn.ReLU()),
    *(torch.nn.Dropout(0.2), torch.nn.Linear(1500, 4)),
)
optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
model = hvd.DataParallel(module, optimizer, microbatches=4)
state = hvd.elastic.TorchState(
    model, optimizer, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9),
    batches=hvd.loader(torch.utils.data.TensorDataset(x, y), 50, microbatches=4), losses=[], step=0,
)
state.register_reset_callbacks([lambda: resets.append(hvd.size())])


@hvd.elastic.run
def train(state):
    global made
    for epoch in state.batches.epochs(3):
        for inputs, targets in state.batches:
            made = state.step
            at("before")
            for xs, ys in state.model.split(inputs, targets):
                cross_entropy(state.model(xs), ys).backward()
            at("backward")
            state.optimizer.step()
            state.schedule.step()
            state.losses.append(epoch)
            state.step += 1
            at("step")
            if state.step % 2 == 0:
                state.commit()
            at("commit")


train(state)
assert isinstance(state.model, hvd.DataParallel) and state.model.world.size == hvd.size()
tell(state.losses, state.step, state.schedule.get_last_lr())
"""
)
HOROVOD = (
    START
    + """
module = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 4)).double()
x, alone = x.double(), copy.deepcopy(module)
optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, module.named_parameters())
pair = hvd.add_process_set([0, 2])
state = hvd.elastic.TorchState(module, optimizer, batch=0)


@hvd.elastic.run
def train(state):
    global made
    while state.batch < 30:
        made = state.batch
        ends = (10 * state.batch + 10 * r // hvd.size() for r in (hvd.rank(), hvd.rank() + 1))
        part = slice(*ends)
        state.optimizer.zero_grad()
        at("before")
        loss = cross_entropy(state.model(x[part]), y[part], reduction="sum") * hvd.size()
        loss.backward()
        at("backward")
        state.optimizer.step()
        state.batch += 1
        if pair.included():
            assert hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=pair)[0] == pair.size()
        if state.batch % 3 == 0:
            state.commit()


train(state)
optimizer = torch.optim.SGD(alone.parameters(), 0.01, momentum=0.9)
for batch in range(30):
    optimizer.zero_grad()
    part = slice(10 * batch, 10 * batch + 10)
    cross_entropy(alone(x[part]), y[part], reduction="sum").backward()
    optimizer.step()
for ours, theirs in zip(module.parameters(), alone.parameters()):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
tell(state.batch, pair.ranks)
"""
)
ELASTIC = (sys.executable, "-m", "mpidl", "run", "--elastic", "-n")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def told(result: job.Result) -> Any:
    assert result.status == 0, result
    return json.loads(result.output)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    script = job.script(tmp_path_factory.mktemp("alone"), SAME_BITS)
    return told(job.execute("openmpi", sys.executable, script, str(SEED), **ONE_THREAD))[0]


@pytest.mark.parametrize(
    ("kills", "resets"),
    [
        (["0:5:step", "2:5:before"], [2, 1]),
        pytest.param(["1:7:backward"], [2], marks=pytest.mark.soak),
        pytest.param(["2:1:before"], [2], marks=pytest.mark.soak),
        pytest.param(["0:9:commit", "1:9:commit"], [1], marks=pytest.mark.soak),
        pytest.param(["1:17:commit"], [2], marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_the_others_go_on(
    kills: list[str], resets: list[int], expected: Any, tmp_path: Path
) -> None:
    script = job.script(tmp_path, SAME_BITS)
    result = job.execute("openmpi", *ELASTIC, "3", script, str(SEED), *kills, **ONE_THREAD)
    found, size, happened = told(result)
    assert found == expected, result
    assert (size, happened[-1:]) == (resets[-1], resets[-1:])


def test_horovods_interface(tmp_path: Path) -> None:
    """Gradients are added up in another order by fewer ranks; a process set loses its member."""
    script = job.script(tmp_path, HOROVOD)
    kill = "0:10:backward"
    result = job.execute("openmpi", *ELASTIC, "3", script, str(SEED), kill, **ONE_THREAD)
    (_, steps, ranks), size, _ = told(result)
    assert (steps, ranks, size) == (30, [1], 2), result


@pytest.mark.soak
def test_an_error_of_the_script_is_raised(tmp_path: Path) -> None:
    text = SAME_BITS.replace('at("step")', 'assert state.step < 3 or rank, "mine"')
    script = job.script(tmp_path, text)
    result = job.execute("openmpi", *ELASTIC, "2", script, str(SEED), **ONE_THREAD)
    assert result.status == 1, result
    assert "AssertionError: mine" in result.errors
