"""Ctrl-C, and a cluster's SIGTERM: the whole job goes, soon and without noise."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import job

RANKS = 3
SECONDS = 60.0  # until no rank is left: it takes about one, but the machine may be busy

START = """
import os, pathlib, time
import numpy as np
import mpidl

world = mpidl.init()
world.barrier()
mine = pathlib.Path(f"{world.rank}.tmp")
mine.write_text(str(os.getpid()))
mine.rename(f"{world.rank}.pid")
end = time.monotonic() + 300
"""
WAITS = {
    "asleep": "time.sleep(300)",
    "in_collectives": """
while world.sum([time.monotonic() < end])[0]:
    mpidl.average(np.ones(10_000, np.float32))
""",
}


def pids(folder: Path) -> list[int]:
    """Wait until every rank has told its process, and return them."""
    end = time.monotonic() + SECONDS
    while len(files := list(folder.glob("*.pid"))) < RANKS:
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_what_is_left(ranks: list[int]) -> list[int]:
    left = [pid for pid in ranks if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


CASES = [("asleep", "group"), ("in_collectives", "group"), ("asleep", "launcher")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("wait", "to"), CASES)
def test_a_signal_ends_all_ranks(
    mpi: str, wait: str, to: str, signum: signal.Signals, tmp_path: Path
) -> None:
    line = (sys.executable, "-m", "mpidl", "run", "-n", str(RANKS))
    process = job.start(mpi, *line, job.script(tmp_path, START + WAITS[wait]), cwd=tmp_path)
    ranks: list[int] = []
    try:
        ranks = pids(tmp_path)
        assert all(map(running, ranks))
        begin = time.monotonic()
        if to == "group":
            os.killpg(process.pid, signum)  # as a terminal does it
        else:
            process.send_signal(signum)  # `mpidl run` is the launcher, or passes it on
        while any(map(running, ranks)) and time.monotonic() < begin + SECONDS:
            time.sleep(0.02)
    finally:
        left = kill_what_is_left(ranks)
        result = job.finish(process, timeout=SECONDS)
    assert not left, result
    assert result.status != 0, result
    assert "KeyboardInterrupt" not in result.output + result.errors, result
    assert "Traceback" not in result.output + result.errors, result
