"""Jobs that end while parameters are on their way."""

from __future__ import annotations

from pathlib import Path

from tests import job

LAST_STEP = """
import time
import numpy as np
import mpidl
from mpidl import functional, nn, optim

world = mpidl.init()
model = nn.Linear(20, 5)
replica = mpidl.DataParallel(model, optim.SGD(0.1), "sharded", overlap=True)
publish = replica.strategy.publish


def slowly(params):
    time.sleep(0.3 * world.rank)  # the others wait for this rank's part
    yield from publish(params)


replica.strategy.publish = slowly
for _ in range(5):
    functional.cross_entropy(model(np.ones((4, 20), np.float32)), np.zeros(4, int)).backward()
    replica.step()
print("done")
"""


def test_a_job_ends_after_its_last_step(mpi: str, tmp_path: Path) -> None:
    result = job.run(mpi, 2, job.script(tmp_path, LAST_STEP))
    assert result.status == 0, result
    assert result.output.split() == ["done", "done"]
    assert not result.errors
