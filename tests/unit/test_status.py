"""`mpidl status`: what schedulers say, what a run says of itself, and both on 80 columns."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpidl.cli.app import app
from mpidl.cli.schedulers import SCHEDULERS
from mpidl.cli.schedulers.base import SchedulerFailed

STATE = {"state": "running", "time": 0, "step": 120, "steps": 600, "epoch": 2, "epochs": 10,
         "loss": 0.25, "samples_per_second": 12345.6, "ranks": 4}  # fmt: skip
QSTAT = "Job Id: 5.server\n    Job_Name = a\n    job_state = {}\n"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    (tmp_path / "bin").mkdir()


def stand_in(name: str, prints: str, status: int = 0) -> None:
    """Put a command on PATH that notes its arguments, prints this, and ends so."""
    Path("said").write_text(prints)
    path = Path("bin") / name
    where = Path.cwd()
    path.write_text(
        f'#!/bin/bash\nPATH=/usr/bin:/bin\necho "$@" >> {where}/calls\n'
        f"cat {where}/said; exit {status}\n"
    )
    path.chmod(0o755)


def a_run(name: str = "train-1", job: str = "5", kind: str = "slurm", **more: Any) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    record = {"job": job, "scheduler": kind, "name": "train", "array": None}
    record["submitted"] = "2026-01-02T03:04:05+00:00"
    (folder / "job.json").write_text(json.dumps({**record, **more}))
    return folder


def status(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["status", *words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()) or "--json" in words
    assert "\x1b" not in result.stdout
    return str(result.stdout)


@pytest.mark.parametrize(
    ("kind", "program", "prints", "expected"),
    [
        (
            "slurm",
            "scontrol",
            "JobId=5 JobName=a JobState=PENDING Reason=Priority",
            ("queued", "PENDING", "Priority"),
        ),
        (
            "slurm",
            "scontrol",
            "JobState=RUNNING RunTime=00:01:00 TimeLimit=01:00:00 NodeList=n[1-2]",
            ("running", "RUNNING", "00:01:00 of 01:00:00 on n[1-2]"),
        ),
        (
            "slurm",
            "scontrol",
            "JobState=COMPLETED ExitCode=0:0",
            ("finished", "COMPLETED", "exit status 0"),
        ),
        (
            "slurm",
            "scontrol",
            "JobState=NODE_FAIL ExitCode=1:0",
            ("failed", "NODE_FAIL", "exit status 1"),
        ),
        (
            "slurm",
            "scontrol",
            "JobState=RUNNING A=1\nJobState=PENDING\nJobState=PENDING\n",
            ("running", "array", "1 running, 2 queued"),
        ),
        (
            "pbs",
            "qstat",
            QSTAT.format("Q") + "    comment = Not Running: x\n",
            ("queued", "Q", "Not Running: x"),
        ),
        ("pbs", "qstat", QSTAT.format("R") + "    exec_host = n1/0\n", ("running", "R", "n1/0")),
        (
            "pbs",
            "qstat",
            QSTAT.format("F") + "    Exit_status = 0\n",
            ("finished", "F", "exit status 0"),
        ),
        (
            "pbs",
            "qstat",
            QSTAT.format("F") + "    Exit_status = 271\n",
            ("failed", "F", "exit status 271"),
        ),
        ("lsf", "bjobs", "PEND|-|-\n", ("queued", "PEND", "")),
        ("lsf", "bjobs", "RUN|-|2*n1:2*n2\n", ("running", "RUN", "on 2*n1:2*n2")),
        ("lsf", "bjobs", "DONE|0|n1\n", ("finished", "DONE", "")),
        ("lsf", "bjobs", "EXIT|3|n1\n", ("failed", "EXIT", "exit status 3")),
        ("lsf", "bjobs", "RUN|-|n\nDONE|0|n\n", ("running", "array", "1 running, 1 finished")),
        ("flux", "flux", "RUNNING|n[1-2]|\n", ("running", "RUNNING", "on n[1-2]")),
        ("flux", "flux", "COMPLETED|n1|0\n", ("finished", "COMPLETED", "exit status 0")),
        ("flux", "flux", "TIMEOUT|n1|142\n", ("failed", "TIMEOUT", "exit status 142")),
        ("kubernetes", "kubectl", "{}", ("queued", "new", "")),
        (
            "kubernetes",
            "kubectl",
            json.dumps(
                {
                    "status": {
                        "conditions": [
                            {"type": "Created", "status": "True"},
                            {"type": "Running", "status": "True", "reason": "MPIJobRunning"},
                            {"type": "Failed", "status": "False"},
                        ]
                    }
                }
            ),
            ("running", "Running", "MPIJobRunning"),
        ),
    ],
)
def test_what_schedulers_say(
    kind: str, program: str, prints: str, expected: tuple[str, str, str]
) -> None:
    stand_in(program, prints)
    found = SCHEDULERS[kind].state("5")
    assert (found.state, found.word, found.detail) == expected
    assert "5" in Path("calls").read_text().split()


def test_slurm_s_accounting_is_asked_for_what_it_forgot() -> None:
    stand_in("scontrol", "slurm_load_jobs error: Invalid job id specified", status=1)
    assert SCHEDULERS["slurm"].state("5").detail == "SLURM has forgotten it"
    accounting = Path("bin/sacct")
    accounting.write_text("#!/bin/bash\necho 'TIMEOUT|0:0'\n")
    accounting.chmod(0o755)
    assert SCHEDULERS["slurm"].state("5").state == "failed"


def test_a_scheduler_that_cannot_be_asked() -> None:
    with pytest.raises(SchedulerFailed, match="qstat: not found"):
        SCHEDULERS["pbs"].state("5")
    a_run()
    assert status("5").startswith("job       5, unknown\n          the scheduler cannot be asked\n")


def test_a_run_tells_of_its_training() -> None:
    stand_in("scontrol", "JobState=RUNNING RunTime=0:01:00 TimeLimit=1:00:00 NodeList=" + "n" * 99)
    folder = a_run()
    (folder / "jobs.log").write_text(
        "".join(f"2026-01-02T03:05:0{i}Z started 5\n" for i in range(3))
    )
    (folder / "state.json").write_text(json.dumps({**STATE, "time": time.time()}))
    shown = status("5")
    assert shown == status(str(folder)) == status("train-1") == status("train")
    lines = shown.splitlines()
    assert lines[0] == "job       5, running"
    assert lines[2:] == [
        "run       runs/train-1",
        "requeued  2 times",
        "training  step 120 of 600, epoch 2 of 10, loss 0.2500, 12,346 samples/s",
    ]
    told = json.loads(status("5", "--json"))
    assert (told["requeues"], told["progress"]["step"], told["state"]) == (2, 120, "running")
    (folder / "state.json").write_text(json.dumps({**STATE, "loss": "nan"}))
    assert "loss nan" in status("5") and "no news for" in status("5")


def test_a_job_that_was_submitted_again_is_followed() -> None:
    stand_in("qstat", QSTAT.format("Q"))
    folder = a_run(job="17.server", kind="pbs")
    log = "2025-01-01T00:00:00Z started 3.server\n2026-01-02T03:05:00Z started 17.server\n"
    (folder / "jobs.log").write_text(log + "2026-01-02T04:05:00Z queued 18.server\n")
    assert "job       18.server, queued (Q)" in status("17")
    assert Path("calls").read_text() == "-x -f 18.server\n"


def test_all_runs() -> None:
    assert status() == "no runs in runs/; mpidl submit makes one\n"
    stand_in("scontrol", "JobState=RUNNING")
    a_run("old", "4", submitted="2025-01-01T00:00:00+00:00")
    new = a_run("n" * 99, "5")
    (new / "state.json").write_text(json.dumps(STATE))
    Path("runs/other").mkdir()
    lines = status().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("5          running ") and lines[0].endswith("step 120 of 600")
    assert lines[1].split() == ["4", "running", "old"]
    assert [run["job"] for run in json.loads(status("--json"))] == ["5", "4"]


@pytest.mark.parametrize("array", ["2-10", None])
def test_the_jobs_of_an_array(array: str | None) -> None:
    """Or processes that each train alone."""
    stand_in("scontrol", "JobState=RUNNING\nJobState=PENDING\n")
    folder = a_run(array=array)
    (folder / "10").mkdir()
    (folder / "2").mkdir()
    (folder / "2/state.json").write_text(json.dumps({**STATE, "time": time.time()}))
    assert status("5").splitlines()[-2:] == [
        "2         step 120 of 600, epoch 2 of 10, loss 0.2500, 12,346 samples/s",
        "10        nothing yet",
    ]


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("FAILED", 1)])
def test_watching_ends_with_the_job(state: str, code: int) -> None:
    a_run()
    stand_in("scontrol", f"JobState={state} ExitCode={code}:0")
    assert status("--watch", "5", code=code).startswith("job       5, f")


def test_what_changes_is_told_while_it_is_watched() -> None:
    folder = a_run()
    stand_in("scontrol", "JobState=RUNNING RunTime=1 TimeLimit=2 NodeList=n")
    # the stand-in makes a step each time it is asked
    step = 'n=$(wc -l < calls); echo "{\\"time\\": 1, \\"step\\": $((n / 2)), \\"steps\\": 9, '
    step += '\\"epoch\\": 1, \\"epochs\\": 1, \\"samples_per_second\\": 1}" > state.json'
    done = "((n < 6)) || echo JobState=COMPLETED ExitCode=0:0 > said"
    path = Path("bin/scontrol")
    text = path.read_text().replace("cat ", f"cd {Path.cwd()}; {step}; {done}; cat ")
    path.write_text(text.replace("> state.json", f"> {folder}/state.json"))
    lines = status("--watch", "--every", "0.1", "5").splitlines()
    changes = [line.split("  ", 1)[1] for line in lines if line[2:3] == ":"]
    assert [line.split(", epoch")[0] for line in changes] == [
        "running, step 1 of 9",
        "running, step 2 of 9",
    ]
    assert [line for line in lines if line.startswith("job ")] == [
        "job       5, running",
        "job       5, finished (COMPLETED)",
    ]


@pytest.mark.parametrize("job", ["--help", "", "5 6", "5;6", "\n"])
def test_a_foreign_folder_gives_no_options_to_the_scheduler(job: str) -> None:
    stand_in("scontrol", "JobState=RUNNING")
    folder = a_run(job=job)
    status(str(folder), code=2)
    assert not Path("calls").exists()


def test_a_foreign_folder_moves_no_cursor() -> None:
    stand_in("scontrol", "JobState=RUNNING NodeList=\x1b[2J")
    folder = a_run()
    (folder / "state.json").write_text(json.dumps({**STATE, "loss": "\x1b[31m"}))
    assert "loss ?[31m" in status("5")
    (folder / "state.json").write_text(json.dumps({**STATE, "step": "\x1b[31m"}))
    assert "training" not in status("5")


def test_what_is_no_job() -> None:
    status("nothing", code=2)
    folder = Path("runs/by-hand")
    folder.mkdir(parents=True)
    (folder / "jobs.log").write_text("2026-01-02T03:05:00Z started 9\n")
    (folder / "state.json").write_text(json.dumps({**STATE, "state": "finished"}))
    assert status("by-hand").startswith("job       9, finished\n")
    (folder / "job.json").write_text("{")
    assert status("by-hand").startswith("job       9, finished\n")
