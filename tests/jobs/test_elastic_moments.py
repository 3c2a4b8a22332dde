"""Ranks that die when only some are done with what all do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests import job

if TYPE_CHECKING:
    from pathlib import Path

ELASTIC = (sys.executable, "-m", "mpidl", "run", "--elastic", "-n", "2")
BEGINS = """
import sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim
from mpidl.checkpoint.saver import Saver
from mpidl.testing import inject
from tests.chaos.endure import Alarm

ranks, begin = mpidl.init(), Saver.begin
x = np.random.default_rng(1).standard_normal((40, 3), np.float32)
trainer = mpidl.Trainer(nn.Linear(3, 2), nn.mse, optim.SGD(0.1), elastic=True, quiet=True)


def begin_late(saver, position):
    begin(saver, position)
    if trainer._elastic.recoveries == 0:
        time.sleep(0.3)
        trainer.world.comm.Iprobe()  # raises


if ranks.rank == 1:
    Saver.begin = begin_late
with inject(trainer, Alarm(0, 0, "before")):
    history = trainer.fit(data.ArrayDataset(x, x[:, :2]), 2, 10)
print(trainer._elastic.recoveries, len(history), trainer.replica.steps)
"""


def test_a_death_when_only_some_have_begun(tmp_path: Path) -> None:
    script = job.script(tmp_path, BEGINS)
    result = job.execute("openmpi", *ELASTIC, script, timeout=30, PYTHONPATH=str(job.ROOT))
    assert result.status == 0, result
    assert result.output == "1 2 8\n" * 2, result


ENDS = """
import os, sys, time
import numpy as np
import mpidl
from mpidl import checkpoint, data, nn, optim

ranks, save = mpidl.init(), checkpoint.Checkpoints.save
x = np.random.default_rng(1).standard_normal((40, 3), np.float32)
model = nn.Linear(3, 2)
trainer = mpidl.Trainer(
    model, nn.mse, optim.SGD(0.1), elastic=True, quiet=True, checkpoint=sys.argv[1]
)


def save_last(self, step, **how):
    if str(self.folder) == sys.argv[1] and how["epoch"] == 2:
        time.sleep(0.3)  # until the snapshot in memory is written
        os.kill(os.getpid(), 9)
    save(self, step, **how)


if ranks.rank == 1:
    checkpoint.Checkpoints.save = save_last
trainer.fit(data.ArrayDataset(x, x[:, :2]), 2, 10)
stored = mpidl.load(sys.argv[1], nn.Linear(3, 2)).state_dict()
for name, value in model.state_dict().items():
    np.testing.assert_array_equal(stored[name], value)
print(trainer._elastic.recoveries, trainer.replica.steps)
"""


def test_a_death_before_the_last_checkpoint(tmp_path: Path) -> None:
    """The snapshot has all epochs, so none is made again: it is written all the same."""
    script = job.script(tmp_path, ENDS)
    result = job.execute("openmpi", *ELASTIC, script, str(tmp_path / "run"), timeout=30)
    assert result.status == 0, result
    assert result.output == "1 8\n", result
