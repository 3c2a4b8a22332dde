"""launch/*.sbatch: a signal reaches the ranks, and a run that wants to go on is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sbatch"))
# Stands in for mpirun: says what it got, and ends as ranks do that have written a checkpoint.
MPIRUN = """#!/bin/bash
trap 'echo stopped >> log; sleep 0.2; exit 75' USR1
touch started
for i in {1..100}; do sleep 0.05; done
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("mpirun", "signals", "status", "log"),
    [
        (MPIRUN, 1, 75, ["stopped", "requeue 17"]),
        (MPIRUN, 2, 75, ["stopped", "requeue 17"]),
        ("#!/bin/bash\ntouch started; exit 0\n", 0, 0, []),
        ("#!/bin/bash\ntouch started; exit 3\n", 0, 3, []),
        ("#!/bin/bash\ntouch started; exit 74\n", 0, 74, []),
        ("#!/bin/bash\ntouch started; exit 75\n", 0, 75, ["requeue 17"]),
    ],
)
def test_it_is_queued_again(
    path: Path, mpirun: str, signals: int, status: int, log: list[str], tmp_path: Path
) -> None:
    for name, text in (("mpirun", mpirun), ("scontrol", '#!/bin/bash\necho "$@" >> log\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "17", "NTASKS": "2", "CPUS_PER_TASK": "1"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", str(path)], env=environment, cwd=tmp_path)
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.wait(timeout=20) == status
    finally:
        process.kill()
    told = tmp_path / "log"
    lines = told.read_text().split("\n")[:-1] if told.exists() else []
    assert list(dict.fromkeys(lines)) == log
