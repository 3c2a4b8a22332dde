"""Runs that are stopped by signals or a full disk, and go on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import job

if TYPE_CHECKING:
    import numpy as np

SECONDS = 20.0
TRAIN = """
import hashlib, pathlib, sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
nn.seed(1)
model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 3))
rng = np.random.default_rng(0)
train = data.ArrayDataset(rng.standard_normal((90, 6)).astype(np.float32), rng.integers(0, 3, 90))
seconds = float(sys.argv[2])

def loss(output, target):
    time.sleep(seconds)
    pathlib.Path(f"{world.rank}.steps").touch()
    return nn.cross_entropy(output, target)

trainer = mpidl.Trainer(
    model, loss, optim.Adam(1e-2), checkpoint=sys.argv[1], keep=2, checkpoint_every=3
)
history = trainer.fit(train, epochs=3, batch_size=9)
bits = b"".join(a.tobytes() for a in model.state_dict().values())
if world.rank == 0:
    print([epoch.loss.hex() for epoch in history], hashlib.sha256(bits).hexdigest())
"""


def train(mpi: str, folder: Path, ranks: int = 2, seconds: float = 0.0) -> job.Result:
    line = (job.script(folder, TRAIN), str(folder / "run"), str(seconds))
    return job.run(mpi, ranks, *line, timeout=SECONDS, cwd=folder)


def stopped(mpi: str, folder: Path, signum: signal.Signals, after: float) -> job.Result:
    """Start a slow training of two ranks, and send its launcher a signal once it trains."""
    for old in folder.glob("*.steps"):
        old.unlink()
    line = (sys.executable, "-m", "mpidl", "run", "-n", "2", job.script(folder, TRAIN))
    process = job.start(mpi, *line, str(folder / "run"), "0.03", cwd=folder)
    try:
        end = time.monotonic() + SECONDS
        while len(list(folder.glob("*.steps"))) < 2:
            assert process.poll() is None and time.monotonic() < end, "it does not train"
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(signum)
    finally:
        result = job.finish(process, SECONDS)
    return result


def test_stopped_by_a_signal_it_goes_on_bit_for_bit(
    mpi: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(mpi, tmp_path / "whole")
    assert whole.status == 0, whole
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        result = stopped(mpi, tmp_path / "parts", signum, rng.uniform(0, 0.25))
        assert result.status == 75, result
        assert not result.output, result
        assert "Traceback" not in result.errors and "MPI_ABORT" not in result.errors, result
    rest = train(mpi, tmp_path / "parts")
    assert rest.status == 0, rest
    assert "resumed from" in rest.errors
    assert rest.output == whole.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that is almost full."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a file system of 1 MiB")
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    made = subprocess.run(line, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a file system of 1 MiB: {made.stderr.strip()}")
    try:
        (folder / "script.py").write_text(TRAIN)
        (folder / "0.steps").touch()
        (folder / "1.steps").touch()
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    good = train("openmpi", small_disk)
    assert good.status == 0, good
    shutil.rmtree(small_disk / "run")
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes((1 << 20) - (24 << 10)))
    result = train("openmpi", small_disk)
    assert result.output == good.output, result  # it trained to its end
    assert result.status == 74, result
    assert result.errors.count("a checkpoint was not written") == 1, result
    assert "ENOSPC" in result.errors and str(small_disk / "run") in result.errors
    assert "MPI_ABORT" not in result.errors, result


def blocks_of_the_page() -> list[str]:
    page = (job.ROOT / "docs/checkpoints.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_page_runs(tmp_path: Path) -> None:
    """docs/checkpoints.md: each block twice, as after a requeue."""
    blocks = blocks_of_the_page()[:2]
    result = job.run("openmpi", 2, job.script(tmp_path, "\n".join(blocks * 2)), cwd=tmp_path)
    assert result.status == 0, result
    assert result.errors.count("resumed from") == 1
    assert len(list((tmp_path / "run").glob("step-*"))) in (3, 4)
    assert len(list((tmp_path / "own").glob("step-*"))) == 3


def test_what_the_page_has_for_pytorch_runs(tmp_path: Path) -> None:
    *_, block = blocks_of_the_page()
    text = f"{block}\nassert step == 30\n{block}\nassert step == 30, step\n"
    result = job.run("openmpi", 2, job.script(tmp_path, text), cwd=tmp_path)
    assert (result.status, result.errors) == (0, ""), result
    names = sorted(path.name for path in (tmp_path / "torch-run").glob("step-*"))
    assert names == ["step-00000012", "step-00000024"]
