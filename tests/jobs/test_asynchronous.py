"""The asynchronous parameter server from start to end: it trains, and every job ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import job
from tests.jobs.test_failures import LIMIT, only_mpich

START = """
import json, sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim
from mpidl.strategies import ParameterServer

world = mpidl.init()
last = world.rank == world.size - 1
LEAF = "a broken leaf"

def made(servers=1, lr=0.1):
    nn.seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    strategy = ParameterServer(world, servers, asynchronous=True)
    return mpidl.DataParallel(model, optim.SGD(lr, momentum=0.9), strategy)

def train(replica, steps):
    for _ in range(steps):
        x = np.random.rand(8, 64).astype(np.float32)
        nn.cross_entropy(replica.model(x), np.arange(8)).backward()
        replica.step()
"""

LEARNS = """
train, test = data.digits()
nn.seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
trainer = mpidl.Trainer(
    model,
    nn.cross_entropy,
    optim.SGD(0.1, momentum=0.9),
    ParameterServer(world, SERVERS, asynchronous=True),
    quiet=True,
)
history = trainer.fit(train, epochs=25, batch_size=96, evaluate=test)
weights = b"".join(p.data.tobytes() for p in model.parameters())
same = len(set(world.gather(weights))) == 1
if world.rank == 0:
    sys.stdout.write(json.dumps([same, history[-1].metrics["accuracy"]]))
"""

# Ways to end well: -> nothing on standard error, status 0.
ENDS = {
    "forgotten": "replica = made(); train(replica, 3)",
    "closed": "replica = made(); train(replica, 3); replica.close()",
    "closed at different times": """
replica = made(servers=world.size)
train(replica, 3)
if world.rank == 0:
    replica.close()  # and still serves
else:
    time.sleep(0.3)
    train(replica, 30)
""",
    "one trains on": """
replica = made()
train(replica, 3)
if last:
    time.sleep(0.3)
    train(replica, 30)
""",
    "several": """
replicas = [made(servers) for servers in (1, world.size)]
for replica in replicas:
    train(replica, 3)
del replica, replicas[0]
""",
    "exit status 0": "replica = made(); train(replica, 3); sys.exit(0)",
}

# Ways in which one rank ends all -> what standard error must hold. Rank 0 is the server.
FAILURES = {
    "an error on the server": (0, "raise ValueError(LEAF)", "ValueError: a broken leaf"),
    "an error elsewhere": (1, "raise ValueError(LEAF)", "ValueError: a broken leaf"),
    "a status on the server": (0, "sys.exit(3)", ""),
    "a plain SystemExit on the server": (0, "raise SystemExit(3)", ""),
    "a plain SystemExit elsewhere": (1, "raise SystemExit(3)", ""),
    "an error in closing order": (0, "replica.close(); raise ValueError(LEAF)", "a broken leaf"),
    "no gradient": (1, "replica.step(5)", "MissingBackward: step 3: no gradient"),
    "an optimizer's error": (1, "train(replica, 1)", "lr at step"),
}


@pytest.mark.parametrize("servers", [1, 3])
def test_digits_are_learnt(mpi: str, servers: int, tmp_path: Path) -> None:
    text = START + LEARNS.replace("SERVERS", str(servers))
    result = job.run(mpi, 3, job.script(tmp_path, text))
    assert result.status == 0, result
    same, accuracy = json.loads(result.output)
    assert same, result
    assert accuracy >= 0.95, result


@pytest.mark.parametrize("end", ENDS)
def test_a_good_end(mpi: str, end: str, tmp_path: Path) -> None:
    text = START + "sys.stdout.write('well\\n')\n" + ENDS[end]
    result = job.run(mpi, 3, job.script(tmp_path, text), timeout=30)
    assert (result.status, result.output.split()) == (0, ["well"] * 3), result
    assert not result.errors.strip(), result


@pytest.mark.parametrize(
    "waits", [pytest.param("in a barrier", marks=pytest.mark.soak), "in training"]
)
@only_mpich
@pytest.mark.parametrize("failure", FAILURES)
def test_a_bad_end_on_one_rank_ends_all(mpi: str, failure: str, waits: str, tmp_path: Path) -> None:
    bad_end(mpi, failure, waits, tmp_path)


def test_a_bad_end_under_any_mpi(mpi: str, tmp_path: Path) -> None:
    bad_end(mpi, "a status on the server", "in training", tmp_path)
    bad_end(mpi, "an error elsewhere", "in a barrier", tmp_path)


def bad_end(mpi: str, failure: str, waits: str, folder: Path) -> None:
    rank, text, message = FAILURES[failure]
    lr = "lambda step: 0.1 if step < 3 else -1" if message == "lr at step" else "0.1"
    text = f"""
replica = made(lr={lr})
train(replica, 3)
world.barrier()
if world.rank == {rank}:
    {text}
if {waits == "in training"}:
    train(replica, 10**9)
world.barrier()
print("nobody may come here", flush=True)
"""
    result = job.run(mpi, 3, job.script(folder, START + text), timeout=LIMIT)
    assert result.status != 0, result
    assert message in result.errors, result
    assert "nobody may come here" not in result.output, result
