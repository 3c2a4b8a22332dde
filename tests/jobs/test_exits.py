"""sys.exit and its kin: a rank that leaves with a bad status takes the others along."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import job
from tests.jobs.test_failures import LIMIT, TRACEBACK, WAIT, on_last, only_mpich

START = """
import argparse, contextlib, sys, threading
import mpidl

world = mpidl.init()
"""

# How the last of three ranks leaves while the others wait -> what standard error must hold.
EXITS = {
    "status": ("sys.exit(3)", ""),
    "message": ("sys.exit('a broken leaf')", "a broken leaf"),
    "argparse": (
        "argparse.ArgumentParser(prog='leaf').parse_args(['--broken'])",
        "leaf: error: unrecognized arguments: --broken",
    ),
    "raise": ("raise SystemExit(3)", ""),
}
ODD_EXITS = {"builtin": "exit(3)", "negative": "sys.exit(-1)", "multiple_of_256": "sys.exit(256)"}

GOOD_ENDS = ["", "sys.exit(0)"]
ODD_GOOD_ENDS = ["sys.exit()", "sys.exit(None)", "exit()", "sys.exit(False)"]

CAUGHT = """
with contextlib.suppress(SystemExit):
    sys.exit(3)
"""
IN_A_THREAD = """
thread = threading.Thread(target=sys.exit, args=(3,))  # ends that thread only, says Python
thread.start()
thread.join()
"""


def leave(mpi: str, folder: Path, text: str) -> job.Result:
    result = job.run(mpi, 3, job.script(folder, START + on_last(text) + WAIT), timeout=LIMIT)
    assert result.status != 0, result
    assert TRACEBACK not in result.errors, result
    assert "nobody may come here" not in result.output, result
    return result


def end_well(mpi: str, folder: Path, text: str) -> None:
    text = START + "sys.stdout.write('well\\n')\n" + text
    result = job.run(mpi, 2, job.script(folder, text), timeout=LIMIT)
    assert (result.status, result.output.split()) == (0, ["well"] * 2), result
    assert not result.errors.strip(), result


@pytest.mark.parametrize("end", EXITS)
def test_an_exit_on_one_rank_ends_the_job(mpi: str, end: str, tmp_path: Path) -> None:
    text, message = EXITS[end]
    assert message in leave(mpi, tmp_path, text).errors


@only_mpich
@pytest.mark.parametrize("end", ODD_EXITS)
def test_an_odd_exit_on_one_rank_ends_the_job(mpi: str, end: str, tmp_path: Path) -> None:
    leave(mpi, tmp_path, ODD_EXITS[end])


@pytest.mark.parametrize("text", GOOD_ENDS)
def test_a_good_end_has_status_0(mpi: str, text: str, tmp_path: Path) -> None:
    end_well(mpi, tmp_path, text)


@only_mpich
@pytest.mark.parametrize("text", ODD_GOOD_ENDS)
def test_an_odd_good_end_has_status_0(mpi: str, text: str, tmp_path: Path) -> None:
    end_well(mpi, tmp_path, text)


@only_mpich
@pytest.mark.parametrize("text", [CAUGHT, IN_A_THREAD], ids=["caught", "in_a_thread"])
def test_an_exit_that_does_not_end_the_script(mpi: str, text: str, tmp_path: Path) -> None:
    end_well(mpi, tmp_path, text)
