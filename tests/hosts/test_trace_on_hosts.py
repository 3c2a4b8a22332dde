"""A trace of ranks on two hosts that have no file system together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from tests import job
from tests.hosts.conftest import SCRIPT, Up
from tests.unit.test_trace import check_nesting

TRAIN = """
import numpy as np
import mpidl
from mpidl import functional, nn, optim
world = mpidl.init()
nn.seed(0)
model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
replica = mpidl.DataParallel(model, optim.SGD(0.01), overlap=True, bucket_bytes=1 << 18)
x = np.ones((8, 256), "f")
for _ in range(12):
    functional.mse(model(x), x).backward()
    replica.step()
replica.synchronize()
replica.close()
"""


def test_parts_and_clocks_come_together(hosts: Up, tmp_path: Path) -> None:
    two = hosts(2)
    path = "/dev/shm/t.json"  # each host has its own
    script = job.script(tmp_path, TRAIN)
    result = two.run("openmpi", [1, 1], sys.executable, script, MPIDL_TRACE=path)
    assert result.status == 0 and "mpidl" not in result.errors, result
    left = job.execute("openmpi", SCRIPT, "run", "t1", "ls", "/dev/shm", HOSTS_DIR=str(two.folder))
    assert "t.json" not in left.output, left
    found = job.execute("openmpi", SCRIPT, "run", "t0", "cat", path, HOSTS_DIR=str(two.folder))
    told = json.loads(found.output)
    check_nesting(told["traceEvents"])
    ((rank, samples),) = told["otherData"]["clocks"]
    assert rank == 1 and len(samples) == 2  # at the start, and at the end
    for _, ahead, uncertainty in samples:
        assert 0 < uncertainty < 0.05 and abs(ahead) <= uncertainty + 1e-4  # one clock
    spans = [event for event in told["traceEvents"] if event["ph"] == "X"]
    ends: list[list[float]] = [[], []]
    for event in spans:
        if event["cat"] == "step":
            ends[event["pid"]].append(event["ts"] + event["dur"])
    assert len(ends[0]) == len(ends[1]) == 12
    assert median(abs(a - b) for a, b in zip(*ends, strict=True)) < 10_000  # us: all end together
    names = {event["name"] for event in spans if event["cat"] == "range"}
    assert any(name.startswith("average of buckets") for name in names), names
    assert any(name.startswith("parameters of bucket") for name in names), names
    tracks = {e["args"]["name"] for e in told["traceEvents"] if e["name"] == "thread_name"}
    assert {"steps", "phases", "mpidl reducer", "mpidl publisher"} <= tracks
