"""`mpidl.testing.Cut`: a host's link that is cut while ranks train, and heals by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import job
from tests.hosts.conftest import SCRIPT
from tests.hosts.test_hosts import ECHO, PING, Server, on

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hosts.conftest import Hosts, Up

TRAIN = """
import json, sys, time
import numpy as np
import mpidl
from mpidl import nn, optim
from mpidl.errors import InvalidArgument
from mpidl.testing import Cut, Kill, inject

world = mpidl.init()
nn.seed(1)
model = nn.Linear(3, 2)
replica = mpidl.DataParallel(model, optim.SGD(0.1))
ends = []
try:
    with inject(replica, *eval(sys.argv[1])):
        for step in range(8):
            nn.mse(model(np.ones((2, 3), np.float32)), np.zeros((2, 2), np.float32)).backward()
            replica.step()
            ends.append(time.monotonic())
            time.sleep(0.02)
    print(json.dumps([world.rank, ends, model.weight.numpy().tolist()]))
except InvalidArgument as error:
    print(f"refused: {error}")
"""


def reached(hosts: Hosts, patience: float) -> bool:
    """Return whether t1 answers t0 in so many seconds."""
    return on(hosts, "t0", PING, 1, 1, patience).split()[0] == "1"


def status_on(hosts: Hosts, name: str, *command: str) -> int:
    environment = job.environment("openmpi", HOSTS_DIR=str(hosts.folder))
    return subprocess.run([SCRIPT, "run", name, *command], env=environment, check=False).returncode


def settled(hosts: Hosts, name: str) -> bool:
    """Return whether nothing is left of a cut, after a while."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        if not hosts.do("pids", name) and "clsact" not in hosts.do("run", name, "tc", "qdisc"):
            return True
        time.sleep(0.05)
    return False


def test_training_waits_for_the_link(hosts: Up, tmp_path: Path, rng: np.random.Generator) -> None:
    two, step = hosts(2), int(rng.integers(1, 7))
    line = (sys.executable, job.script(tmp_path, TRAIN))
    told: list[Any] = []
    for faults in ("[]", f"[Cut(1, {step}, 0.7, 'eth0')]"):
        result = two.run("openmpi", [1, 1], *line, faults)
        assert result.status == 0, result
        told.append(sorted(json.loads(text) for text in result.output.splitlines()))
    (_, before, expected), (_, ends, weights) = told[0][0], told[1][0]
    assert len(before) == len(ends) == 8
    assert max(np.diff(before)) < 0.6
    assert int(np.argmax(np.diff(ends))) == step - 1, ends
    assert max(np.diff(ends)) > 0.6
    assert weights == told[1][1][2] == expected
    assert settled(two, "t1")


def test_it_heals_where_the_rank_is_killed(hosts: Up, tmp_path: Path) -> None:
    """And where its healer is asked to end; one for good stays."""
    two, script = hosts(2), job.script(tmp_path, TRAIN)
    with Server(two, ECHO) as server:
        assert reached(two, 1)
        for seconds in (0.8, 60, None):
            faults = f"[Cut(0, 1, {seconds}), Kill(0, 1, 'share')]"
            begin = time.monotonic()
            assert status_on(two, "t1", sys.executable, script, faults) == -signal.SIGKILL
            assert not reached(two, 0.1)
            healers = {int(pid) for pid in two.do("pids", "t1").split()} - {server.pid}
            assert bool(healers) == (seconds is not None)
            if seconds == 60:
                for pid in healers:
                    os.kill(pid, signal.SIGTERM)
            if seconds is None:
                break
            while not reached(two, 0.1):
                assert time.monotonic() < begin + 5
            assert seconds == 60 or time.monotonic() > begin + seconds
    assert not reached(two, 0.5)


def test_all_ranks_are_told_where_it_cannot_be(hosts: Up, tmp_path: Path) -> None:
    two = hosts(2)
    without = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable)
    script = job.script(tmp_path, TRAIN)
    for line, faults, problem in [
        (without, "[Cut(1, 5)]", "eth0: RTNETLINK answers: Operation not permitted"),
        ((sys.executable,), "[Cut(1, 5, 1, 'ib0')]", "its links that are up, but lo: eth0"),
    ]:
        result = two.run("openmpi", [1, 1], *line, script, faults)
        assert result.status == 0, result
        said = result.output.splitlines()
        assert len(said) == 2, result
        for text in said:
            assert text.startswith("refused: rank 1: Cut(rank=1, step=5"), result
            assert "cannot be on t1: " in text, result
            assert problem in text, result
    assert settled(two, "t1")
