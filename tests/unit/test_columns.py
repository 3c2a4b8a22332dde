"""What the commands print fits in 80 columns, and has no colours where it goes to a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpidl.cli import doctor, doctor_findings, launcher, schedulers, told
from mpidl.cli.app import app
from mpidl.cli.doctor_hosts import Found
from mpidl.cli.schedulers.base import SchedulerFailed, State
from mpidl.errors import InvalidArgument
from tests.unit.test_doctor_hosts import ONE, measured
from tests.unit.test_help import COMMANDS

LONG = [f"compute-{i:04}.rack-17.cluster.example.org" for i in range(3)]  # of 40 letters
TERMINALS: dict[str, str | None] = {"COLUMNS": "80", "TERM": "xterm-256color"}


def fits(text: str, *, whole: tuple[str, ...] = ()) -> None:
    """Fail where a line is longer, but for one that is a long word, as of `whole`, by itself."""
    assert "\x1b" not in text
    for line in text.splitlines():
        assert len(line) <= 80 or line.strip().startswith(whole or "\0"), line


@pytest.mark.parametrize("words", [(), ("bench",), *COMMANDS], ids=" ".join)
def test_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env=TERMINALS)
    assert result.exit_code == 0
    fits(result.stdout)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = {name: {**ONE, "host": name, "gpus": None} for name in LONG}
    facts[LONG[1]] |= {"python": "3.10.1", "cores": 32, "shared_memory": None, "open_files": 256}
    failed = {"gone-" + LONG[0]: ("not reached: No route to host", "ssh HOST true must end well")}
    found = Found(facts, None, doctor_findings.of_hosts(facts, failed))
    assert {finding.state for finding in found.findings} == {"ok", "warning", "problem"}
    slow = measured(9.4, 0.94, 0.0093, clocks=[(0.0, 0.0), (7.0, 2e-5), (-2e-4, 2e-5)])
    found.findings += doctor_findings.of_network(LONG, facts, slow)
    report = doctor.Report(
        {"mpi": "Open MPI v5.0.11", "gpus": ["NVIDIA H100 80GB HBM3"] * 8, "cores": 4},
        ["two ranks were asked for, and this came: " + str({"ranks": 1, "nodes": 1, "why": "no"})],
        ["an NVIDIA driver is loaded, but CuPy is missing: pip install 'mpidl[cuda12]', " * 2],
    )
    doctor.show(report, as_json=False, found=found)
    shown = capsys.readouterr().out
    fits(shown)
    assert "8 x NVIDIA H100 80GB HBM3" in shown
    for finding in found.findings:  # nothing is left out
        assert " ".join(f"{finding.text} {finding.next}".split()[:3]) in " ".join(shown.split())

    well = Found({name: {} for name in LONG}, None, [])
    doctor.show(doctor.Report({}), as_json=False, found=well)
    fits(capsys.readouterr().out, whole=(",".join(LONG),))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a job with long names, in a folder with a long name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / f"{'a-long-name-' * 5}20260102-030405"
    folder.mkdir(parents=True)
    record = {"job": "4711", "scheduler": "slurm", "name": "a-long-name-" * 5, "submitted": "2026"}
    (folder / "job.json").write_text(json.dumps(record))
    progress = {
        "state": "running", "time": time.time() - 1e4, "step": 12_345_678, "steps": 99_999_999,
        "epoch": 12_345, "epochs": 99_999, "loss": 123_456.789, "samples_per_second": 1.5e9,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(progress))
    detail = f"1-02:03:04 of 2-00:00:00 on {','.join(LONG)}"

    def state_of(job: str) -> State:
        if job != "4711":
            raise SchedulerFailed("no such job")
        return State("running", "RUNNING", detail)

    monkeypatch.setattr(schedulers.SCHEDULERS["slurm"], "state", state_of)
    return folder


def test_status(run: Path) -> None:
    for words in ([], ["4711"], [run.name], ["no-such-job-" * 12]):
        result = CliRunner().invoke(app, ["status", *words], env=TERMINALS)
        assert result.exit_code == (2 if words and words[0].startswith("no") else 0)
        fits(result.stdout)
        fits(result.stderr, whole=("'no-such",))


@pytest.mark.parametrize("kind", list(schedulers.SCHEDULERS))
def test_submit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job scripts hold the user's words, as long as they are; the rest is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("train.py").touch()
    line = ["submit", "--scheduler", kind, "--dry-run", "--gpus-per-node=4", "--ranks-per-node=2"]
    if kind == "kubernetes":
        line += ["--container", "registry/image"]
    result = CliRunner().invoke(app, [*line, "train.py"], env=TERMINALS)
    assert result.exit_code == 0, result.stderr
    fits(result.stderr)
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 130 + len(str(tmp_path))
    for words in (["--nodes", "4"], ["--time", "x" * 30], ["--name", "two words"]):
        refused = CliRunner().invoke(app, [*line, *words, "train.py", "--nodes", "3"])
        assert refused.exit_code == 2
        fits(refused.stderr)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def query() -> launcher.Library:
        raise InvalidArgument("a reason of some words, " * 12 + "/and/a/path" * 12)

    monkeypatch.setattr(launcher, "query", query)
    for words in (["run", "x.py"], ["bench", "allreduce"], ["run", "--hosts", "a b" * 60, "x.py"]):
        result = CliRunner().invoke(app, words, env=TERMINALS)
        assert result.exit_code in (1, 2)
        assert result.stderr.startswith("mpidl: ")
        fits(result.stderr, whole=("/and/a/path",))


def test_words_and_lines_of_others_stay_whole() -> None:
    words = "/a/path" * 20
    shown = told.wrapped(f"{'short ' * 20}{words} end", "mpidl: ")
    assert words in shown.splitlines()[2] and shown.splitlines()[0].startswith("mpidl: short")
    assert shown.replace("\n  ", " ") == f"mpidl: {'short ' * 20}{words} end"
    other = "it failed:\n" + "  a trace " * 20
    assert told.wrapped(other, "mpidl: ") == f"mpidl: {other}"


def test_a_file_gets_no_colours() -> None:
    """Though the terminal could show them."""
    for words in (["--help"], ["doctor", "--help"], ["run", "--launcher", "none"]):
        done = subprocess.run(
            [sys.executable, "-m", "mpidl", *words],
            env={**TERMINALS, "PATH": "/usr/bin:/bin", "COLORTERM": "truecolor"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        fits(done.stdout)
        fits(done.stderr)
        assert done.stdout + done.stderr
