"""Ranks fail together: an error on one of them ends the job within seconds, and is told once."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from tests import job

LIMIT = 40  # seconds: those that wait for ever, or for a minute, are ended before
TRACEBACK = "Traceback (most recent call last)"
LEAF = "a broken leaf"  # the scripts write it as LEAF, so that no quoted source line holds it

START = f"""
import contextlib, os, signal, sys, threading, time
import mpidl
from mpidl.errors import InvalidArgument, RankMismatch

world = mpidl.init()
LEAF = "{LEAF}"
"""

WAIT = """
world.barrier()
print("nobody may come here", flush=True)
"""

IN_A_THREAD = """
def work():
    raise ValueError(LEAF)

if world.rank == world.size - 1:
    threading.Thread(target=work).start()
"""
WAIT_IN_MPI = "world.comm.recv()\n"  # nobody sends: the failing rank's main thread waits too

# How the last rank ends while the others wait in a barrier. These end alike under any MPI.
ERRORS = {
    "of_the_system": "open('/nonexistent/' + LEAF)",
    "chained": """
    try:
        raise KeyError("what was there before")
    except KeyError as error:
        raise ValueError(LEAF) from error
""",
    "of_many_lines_and_no_utf8": "raise ValueError(LEAF + chr(10) * 3 + 'ä' + chr(0xDC80))",
    "that_cannot_be_printed": """
    class Leaf(Exception):
        def __str__(self):
            raise KeyError("a broken branch")

    raise Leaf from ValueError(LEAF)
""",
    "after_stdout_was_closed": """
    sys.stdout.close()
    raise ValueError(LEAF)
""",
    "after_stderr_was_replaced": """
    class Log:
        def write(self, text): pass

    sys.stderr = Log()
    raise ValueError(LEAF)
""",
}

KILLED = {"by_signal": "os.kill(os.getpid(), signal.SIGKILL)", "without_finalize": "os._exit(3)"}

AGREED = {  # text of the script -> the last line of the only traceback
    "of_one_rank": (
        "world.agree(LEAF if world.rank == 1 else None)",
        f"RankMismatch: rank 1: {LEAF}",
    ),
    "of_several_ranks": (
        "with world.together():\n    if world.rank:\n        raise InvalidArgument(LEAF)",
        f"InvalidArgument: ranks 1, 2: {LEAF}",
    ),
    "of_all_ranks": (
        "mpidl.strategies.make('rong', world)",
        "UnknownStrategy: every rank: unknown strategy 'rong'; known are: ",
    ),
}

only_mpich = pytest.mark.parametrize("mpi", ["mpich"], indirect=True)  # the faster of the two


def run(mpi: str, folder: Path, ranks: int, text: str) -> job.Result:
    result = job.run(mpi, ranks, job.script(folder, START + text), timeout=LIMIT)
    assert result.status != 0, result
    assert "nobody may come here" not in result.output, result
    return result


def on_last(text: str) -> str:
    return f"if world.rank == world.size - 1:\n    {text.strip()}\n"


def assert_told_once(result: job.Result, rank: int, ranks: int, tracebacks: int = 1) -> None:
    assert result.errors.count(LEAF) == 1, result
    assert result.errors.count(TRACEBACK) == tracebacks, result
    head = f"mpidl: rank {rank} of {ranks} on {platform.node()} failed\n"
    assert result.errors.count(head) == result.errors.count("mpidl: rank") == 1, result
    assert 'script.py", line' in result.errors, result  # where it was raised


def test_open_mpi_finds_its_messages_without_its_launcher(tmp_path: Path) -> None:
    result = job.execute(
        "openmpi", sys.executable, job.script(tmp_path, START + "raise ValueError(LEAF)")
    )
    assert result.status != 0 and LEAF in result.errors, result
    assert "MPI_ABORT was invoked" in result.errors and "Sorry" not in result.errors, result


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_error_on_one_rank_ends_the_job(mpi: str, ranks: int, tmp_path: Path) -> None:
    text = "print(f'from {world.rank}\\n', end='')\nworld.barrier()\n"
    wait = WAIT if ranks > 1 else ""
    result = run(mpi, tmp_path, ranks, text + on_last("raise ValueError(LEAF)") + wait)
    assert_told_once(result, ranks - 1, ranks)
    said = [line for line in result.output.splitlines() if line.startswith("from ")]
    assert sorted(said) == [f"from {r}" for r in range(ranks)], result  # nothing is lost


@only_mpich
@pytest.mark.parametrize("end", ERRORS)
def test_an_error_of_any_kind(mpi: str, end: str, tmp_path: Path) -> None:
    result = run(mpi, tmp_path, 2, on_last(ERRORS[end]) + WAIT)
    chained = end in ("chained", "that_cannot_be_printed")
    assert_told_once(result, 1, 2, tracebacks=1 + (end == "chained"))
    assert ("direct cause" in result.errors) == chained, result


def test_an_error_in_a_thread(mpi: str, tmp_path: Path) -> None:
    assert_told_once(run(mpi, tmp_path, 2, IN_A_THREAD + WAIT_IN_MPI), 1, 2)


@only_mpich
def test_an_error_in_a_thread_while_the_main_one_sleeps(mpi: str, tmp_path: Path) -> None:
    assert_told_once(run(mpi, tmp_path, 2, IN_A_THREAD + "time.sleep(60)\n"), 1, 2)


@pytest.mark.parametrize("end", KILLED)
def test_a_rank_that_dies_without_a_word(mpi: str, end: str, tmp_path: Path) -> None:
    run(mpi, tmp_path, 2, on_last(KILLED[end]) + WAIT)


def test_different_errors_on_all_ranks(mpi: str, tmp_path: Path) -> None:
    result = run(mpi, tmp_path, 3, "raise ValueError(LEAF, world.rank)")
    told = [f"ValueError: ('{LEAF}', {rank})" in result.errors for rank in range(3)]
    assert any(told), result  # the first may end the others before they speak
    assert sum(told) == result.errors.count(TRACEBACK) == result.errors.count("mpidl: rank"), result


@pytest.mark.parametrize("problem", AGREED)
def test_an_error_that_all_agree_on_is_told_by_rank_0(
    mpi: str, problem: str, tmp_path: Path
) -> None:
    text, message = AGREED[problem]
    result = run(mpi, tmp_path, 3, text)
    assert result.errors.count("mpidl: rank 0 of 3 on ") == 1, result
    assert result.errors.count("mpidl: rank") == 1, result
    assert result.errors.count(message) == 1, result


def test_an_agreed_error_is_told_once_where_rank_0_is_slow(mpi: str, tmp_path: Path) -> None:
    """It has printed it, and then the others end the job without a word."""
    text = """
from mpidl import abort
if world.rank == 0:
    abort._guard.abort = lambda status: time.sleep(60)
world.agree(LEAF)
"""
    result = job.run(mpi, 3, job.script(tmp_path, START + text), timeout=30)
    assert result.status != 0, result
    assert result.errors.count("mpidl: rank") == 1, result
    assert result.errors.count(f"RankMismatch: every rank: {LEAF}") == 1, result


@only_mpich
def test_an_agreed_error_that_rank_0_catches_is_still_told(mpi: str, tmp_path: Path) -> None:
    text = """
with contextlib.suppress(RankMismatch) if world.rank == 0 else contextlib.nullcontext():
    world.agree(LEAF)
"""
    result = run(mpi, tmp_path, 2, text + WAIT)
    assert result.errors.count(f"RankMismatch: every rank: {LEAF}") == 1, result


def test_without_abort_on_error_errors_are_pythons_own(mpi: str, tmp_path: Path) -> None:
    text = """
mpidl.init(abort_on_error=False)
python = sys.excepthook
def hook(*error):
    sys.stdout.write(f"hook of {world.rank}\\n")
    python(*error)
    world.barrier()  # the first to end ends the others, which must have printed theirs
sys.excepthook = hook
world.barrier()
raise ValueError(LEAF)
"""
    result = run(mpi, tmp_path, 2, text)
    hooks = [line for line in result.output.splitlines() if line.startswith("hook")]
    assert sorted(hooks) == ["hook of 0", "hook of 1"], result
    # Python writes a traceback in pieces, between which another rank's may come
    assert result.errors.count(f": {LEAF}") == 2, result
    assert "mpidl: rank" not in result.errors, result


@only_mpich
def test_without_abort_on_error_nothing_of_python_is_replaced(mpi: str, tmp_path: Path) -> None:
    text = """
import sys, threading, mpidl
before = sys.excepthook, threading.excepthook, sys.exit
mpidl.init(abort_on_error=False)
assert before == (sys.excepthook, threading.excepthook, sys.exit)
"""
    result = job.run(mpi, 2, job.script(tmp_path, text), timeout=LIMIT)
    assert result.status == 0, result
