"""`mpidl watch`: a run on a terminal, and in a file."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mpidl.cli import watch_picture
from mpidl.cli.app import app
from mpidl.clock import PHASES
from mpidl.report.run import Run
from tests.unit.run_folders import make, write


def watch(*words: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["watch", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "\x1b" not in result.output
    return str(result.output)


def now(folder: Path, **more: Any) -> dict[str, Any]:
    """Change state.json, and return it."""
    state = json.loads((folder / "state.json").read_text())
    state |= {"time": time.time(), **more}
    write(folder / "new", [state])
    (folder / "new").replace(folder / "state.json")
    return dict(state)


def test_one_picture(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "digits", rng, epochs=3, ended=False)
    state = now(folder)
    lines = watch("--once", folder).splitlines()
    assert lines[0] == "digits"
    assert lines[1] == f"running, step {state['step']} of {state['steps']}, epoch 3 of 6"
    assert lines[2] == (f"loss {state['loss']:.4f}, {state['samples_per_second']:,.0f} samples/s, "
                        "83 s left, rank 0 waits 4 %")  # fmt: skip
    assert max(map(len, lines)) <= 80
    titles = ["loss", "samples / s", "time of each of 4 ranks"]
    assert [line for line in lines if line in titles] == titles
    bars = [line for line in lines if re.match(r" +\d │█+▚", line)]
    assert [int(bar.split()[0]) for bar in bars] == [0, 1, 2, 3]
    now(folder, time=time.time() - 1000)
    assert "no news for 16 min 40 s" in watch("--once", folder)


@pytest.mark.parametrize("plain", [False, True])
def test_bars_are_as_long_as_the_phases(
    plain: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    run = Run(make(tmp_path / "a", rng, ranks=5, epochs=2))
    width = int(rng.integers(60, 200))
    text = watch_picture.picture(run, width, None, plain=plain).plain
    assert text.isascii() == plain
    marks = watch_picture.LETTERS if plain else watch_picture.BLOCKS
    bars = text.splitlines()[-5:]
    spent = run.epochs[-1].phases
    longest = max(sum(spent[p][r] for p in PHASES) for r in range(5))
    for rank, bar in enumerate(bars):
        assert len(bar) <= width
        for phase in PHASES:
            expected = spent[phase][rank] / longest * (width - 10)
            assert abs(bar[10:].count(marks[phase]) - expected) <= 1.01


def test_of_many_ranks_those_with_most_work(rng: np.random.Generator, tmp_path: Path) -> None:
    slow = int(rng.integers(512))
    run = Run(make(tmp_path / "a", rng, ranks=512, epochs=1, slow=slow, lines=2))
    for lines in (24, 40):
        text = watch_picture.picture(run, 80, lines, plain=False).plain.splitlines()
        assert len(text) <= lines
        first = next(i for i, line in enumerate(text) if "of 512 ranks with most work" in line)
        assert int(text[first + 2].split()[0]) == slow


def test_a_curve_shows_where_values_are(rng: np.random.Generator) -> None:
    x = np.arange(200)
    high = int(rng.integers(3, 9))
    *rows, axis = watch_picture.curve(list(zip(x, x * 0.01, strict=True)), 60, high, plain=True)
    first = [row.plain[10:].find("*") for row in rows]
    assert first == sorted(first, reverse=True) and min(first) == 0  # it rises
    assert rows[0].plain.split()[0] == "1.99" and rows[-1].plain.split()[0] == "0"
    assert axis.plain.split() == ["0", "update", "199"]
    for odd in ([(5, 1.0)], [(1, 2.0), (2, 2.0)], [(1, float("nan")), (2, -3.0)]):
        shown = watch_picture.curve(odd, 40, 4, plain=False)
        assert any("\u2801" <= c <= "\u28ff" for row in shown for c in row.plain)


def test_without_a_terminal_there_are_lines(rng: np.random.Generator, tmp_path: Path) -> None:
    """One for each change, until the run has ended, with its exit status."""
    folder = make(tmp_path / "a", rng, epochs=1, ended=False)

    def train() -> None:
        for step, state in ((79, "running"), (80, "failed")):
            time.sleep(0.5)
            now(folder, step=step, state=state, loss="nan")

    thread = threading.Thread(target=train)
    thread.start()
    lines = watch("--every", "0.1", folder, code=1).splitlines()
    thread.join()
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line).split(" of")[0] for line in lines] == [
        "running, step 78", "running, step 79", "failed, step 80",
    ]  # fmt: skip
    assert "loss nan" in lines[-1]


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_its_status(state: str, code: int, rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=1)
    now(folder, state=state)
    assert f"{state}, step 78 of 78" in watch(folder, code=code)


def test_a_terminal_is_drawn_on_until_the_end(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=2, ended=False)
    now(folder)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mpidl", "watch", "--every", "0.1", str(folder)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30"}
    for name in ("NO_COLOR", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    try:
        shown = read_until(master, "▞")
        assert "\x1b[" in shown and "running, step 156 of 312" in shown and "█" in shown
        now(folder, state="finished", step=312)
        read_until(master, "finished, step 312 of 312")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(terminal: int, text: str) -> str:
    found = b""
    end = time.monotonic() + 60
    while text not in found.decode(errors="ignore"):
        assert time.monotonic() < end, found
        if select.select([terminal], [], [], 1)[0]:
            found += os.read(terminal, 65536)
    return found.decode(errors="ignore")


def test_ctrl_c_ends_it_quietly(rng: np.random.Generator, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder = make(tmp_path / "a", rng, epochs=1, ended=False)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert len(watch(folder, code=130).splitlines()) == 1


def test_a_submitted_run_is_waited_for(rng: np.random.Generator, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    record = {"job": "5", "scheduler": "slurm", "name": "train", "submitted": "2026-01-02T03:04:05"}
    write(tmp_path / "job.json", [record])
    monkeypatch.setattr(time, "sleep", lambda _: make(tmp_path, rng, epochs=1))
    lines = watch(tmp_path).splitlines()
    assert "submitted, and not begun" in lines[0] and "finished" in lines[1]


def test_what_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        said = watch(path, code=2)
        assert said.startswith("mpidl: ") and "no run folder" in said and said.count("\n") == 1


def test_a_run_with_nothing_yet(rng: np.random.Generator, tmp_path: Path) -> None:
    write(tmp_path / "config.json", [{"ranks": 2}])
    assert watch("--once", tmp_path).splitlines() == [tmp_path.name, "no state.json"]
    write(tmp_path / "state.json", [{"state": "\x1b[31mred", "loss": [], "steps": "x"}])
    assert "?[31mred, step ? of ?" in watch("--once", tmp_path)


def test_an_ascii_terminal(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=1)
    command = [sys.executable, "-m", "mpidl", "watch", "--once", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.isascii() and b"CCCC" in done.stdout
    assert io.BytesIO(done.stdout).readline() == b"a\n"
