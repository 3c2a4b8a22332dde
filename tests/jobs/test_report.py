"""`mpidl report` and `mpidl watch` of a training that was: what they read is what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from mpidl.cli.app import app
from mpidl.clock import PHASES
from mpidl.report.run import Run
from tests import job
from tests.unit.pages import Page


def test_of_a_run_that_went_on(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    words = ("--out", str(folder), "--checkpoint", str(tmp_path / "checkpoints"))
    for epochs in (2, 3):
        done = job.run("openmpi", 2, "examples/digits_mlp.py", "--epochs", str(epochs), *words)
        assert done.status == 0, done
    lines = [
        json.loads(line)
        for name in ("metrics.jsonl.1", "metrics.jsonl")
        for line in (folder / name).read_text().splitlines()
    ]
    written = [line for line in lines if line["kind"] == "epoch"]
    run = Run(folder)
    assert [e.epoch for e in run.epochs] == [e["epoch"] for e in written] == [1, 2, 3]
    assert len(run.times) == 3 and run.damaged == {}
    for phase in PHASES:
        spent = np.sum([e["phases"][phase] for e in written], axis=0)
        np.testing.assert_allclose(run.phases()[phase], spent)
    for words in (("report", str(folder), "-o", str(tmp_path / "page.html")),
                  ("watch", str(folder))):  # fmt: skip
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (result.output, result.exception)
    assert f"finished, step {written[-1]['steps']} of" in result.output
    page = Page((tmp_path / "page.html").read_text())
    assert [row[0] for row in page.table("Epochs").rows[1:]] == ["1", "2", "3"]
    titles = {"Loss", "Accuracy", "Throughput", "Time of a step by rank", "Work of each rank"}
    assert titles <= set(page.said["h3"])
