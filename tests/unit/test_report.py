"""`mpidl report`: what the page of some runs holds. In a browser: test_report_browser.py."""

from __future__ import annotations

import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mpidl.cli.app import app
from mpidl.clock import PHASES
from mpidl.report import noise, phases, scaling, style
from mpidl.report.page import page
from mpidl.report.run import Run
from tests.unit.pages import Page
from tests.unit.run_folders import make, write

HOSTILE = "<script>alert('x')</script> & $\\frac{1}$ \x1b[31m \ud800 {{ 7777 * 7 }}"


def report(*words: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return str(result.output)


def checked(text: str) -> Page:
    """Return a page that needs nothing from outside, and that says what its figures show."""
    bare = re.sub(r"base64,[\w+/=\s]+", "", text)
    assert re.findall(r"https?:|//\w|<script|<link|<iframe|@import|xlink|srcset", bare) == []
    assert all("url(#" in found for found in re.findall(r"url\(.{5}", text))
    found = Page(text)
    for image in found.all("image"):
        assert image["href"].startswith("data:image/png;base64,")
    plots = [svg for svg in found.all("svg") if svg["class"] == "plot"]
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in plots)
    ids = [one["id"] for _, one in found.elements if "id" in one]
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    assert used == set(ids)
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_tables_hold_the_numbers_of_the_files(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, ranks=3, epochs=int(rng.integers(2, 7)))
    out = tmp_path / "page.html"
    assert report(folder, "-o", out).split() == [str(out)]
    found = checked(out.read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    head, *rows = found.table("Epochs").rows
    assert head == [
        "epoch",
        "updates",
        "loss",
        "test loss",
        "test accuracy",
        "seconds",
        "samples / s",
    ]
    expected = [[e["epoch"], e["steps"], e["loss"], e["metrics"]["loss"], e["metrics"]["accuracy"],
                 e["seconds"], e["samples_per_second"]] for e in epochs]  # fmt: skip
    np.testing.assert_allclose([[number(c) for c in row] for row in rows], expected, rtol=2e-3)
    _, *rows = found.table("Seconds of each rank").rows
    for rank, (name, host, *cells) in enumerate(rows):
        assert (int(name), host) == (rank, "node0")
        spent = [sum(e["phases"][p][rank] for e in epochs) for p in PHASES]
        np.testing.assert_allclose([number(c) for c in cells], spent, rtol=2e-3)
    facts = dict(found.table("Results").rows[1:])
    summary = json.loads((folder / "summary.json").read_text())
    assert number(facts["efficiency"].split()[0]) == pytest.approx(
        100 * summary["efficiency"], rel=0.01
    )
    best = max(e["metrics"]["accuracy"] for e in epochs)
    assert number(facts["highest test accuracy"]) == pytest.approx(best, rel=1e-3)
    rates = [e["samples_per_second"] for e in epochs]
    assert number(facts["samples / s"]) == pytest.approx(np.median(rates), rel=1e-3)
    config = dict(found.table("Configuration and environment").rows[1:])
    assert (config["optimizer.SGD.lr"], config["hosts"]) == ("0.1", "node0 (x3)")
    assert summary["advice"][0] in found.said["li"]
    titles = ["Loss", "Accuracy", "Throughput", "Time of a step", "Time of a step by rank",
              "Work of each rank", "Gradient-noise scale"]  # fmt: skip
    assert [title for title in found.said["h3"] if title] == titles
    for name in ("loss", "updates", "samples / s", "rank", "time of a step (ms)"):
        assert name in found.said["text"], name


def test_runs_stand_side_by_side(rng: np.random.Generator, tmp_path: Path) -> None:
    one = make(tmp_path / "one", rng, ranks=1, epochs=3)
    two = make(tmp_path / "two", rng, ranks=2, epochs=3)
    other = make(tmp_path / "other", rng, ranks=2, epochs=3, settings={"codec": "bf16"})
    found = checked(page([Run(p) for p in (one, two, other)]))
    config = found.table("Configuration and environment")
    assert config.rows[0] == ["", "one", "two", "other"]
    assert {"codec", "ranks"} <= config.marked
    assert not {"samples", "device", "optimizer.SGD.lr"} & config.marked
    assert "Scaling" in found.said["h3"] and "Loss over time" in found.said["h3"]
    (label,) = [
        svg["aria-label"] for svg in found.all("svg") if "Scaling" in svg.get("aria-label", "")
    ]
    assert "hierarchical, batch 256" in label and "hierarchical bf16, batch 256" in label
    legend = " ".join(found.said["li"])
    assert all(name in legend for name in ("one", "two", "other", "ideal"))


def test_what_scales(rng: np.random.Generator, tmp_path: Path) -> None:
    runs = [Run(make(tmp_path / f"{n}-{b}", rng, ranks=n, batch=b, epochs=2, lines=1,
                     settings={"samples": 1024}))
            for n, b in ((1, 64), (2, 64), (4, 256))]  # fmt: skip
    found = {kind: [run.ranks for run in some] for kind, some in scaling.groups(runs)}
    assert found == {"batch 64": [1, 2], "64 a rank": [1, 4]}
    assert scaling.groups(runs[:1]) == []
    other = make(tmp_path / "other", rng, ranks=2, batch=64, epochs=2, settings={"device": "cuda"})
    assert scaling.groups([runs[0], Run(other)]) == []


def test_what_others_wrote_is_text(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "<b>$x$ & _", rng, epochs=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "epoch":
            line["metrics"][HOSTILE] = 1.0
            line["metrics"]["_$x^"] = 2.0
    write(folder / "metrics.jsonl", lines)
    config = json.loads((folder / "config.json").read_text())
    config |= {"command": [HOSTILE], HOSTILE: {HOSTILE: [HOSTILE]}, "hosts": [HOSTILE] * 4}
    write(folder / "config.json", [config])
    state = json.loads((folder / "state.json").read_text())
    write(folder / "state.json", [state | {"state": HOSTILE}])
    write(folder / "summary.json", [{"advice": [HOSTILE, 7, None]}])
    found = checked(page([Run(folder)]))
    assert "54439" not in str(found.said)
    assert found.said["h1"] == ["<b>$x$ & _"]
    cells = [cell for table in found.tables for row in table.rows for cell in row]
    assert sum("<script>alert" in cell for cell in cells) >= 4


def test_the_noise_scale_says_what_batches_cost(rng: np.random.Generator, tmp_path: Path) -> None:
    run = Run(make(tmp_path / "a", rng, epochs=8))
    scale = noise.of(run)
    assert scale is not None
    late = sorted(e.noise["scale"] for e in run.epochs)
    assert late[0] < scale.scale <= late[-1] and scale.batch == 256
    factor = float(rng.uniform(0.1, 10))
    updates, samples = scale.updates(factor), scale.samples(factor)
    now = 1 + scale.scale / scale.batch  # S / S_min; the hyperbola of the paper holds at any batch
    assert (updates * now - 1) * (samples * (1 + scale.batch / scale.scale) - 1) == pytest.approx(1)
    for batch, word in ((10, "would still pay"), (1000, "is about"), (10_000, "bring little")):
        assert word in noise.Noise(1000, batch, 50).advice()
    found = checked(page([run])).table("Other batch sizes, to the same loss, relative to now")
    assert ["256 (now)", "1.00", "1.00"] in found.rows
    assert noise.of(Run(make(tmp_path / "b", rng, epochs=0, ended=False, lines=0))) is None


def test_the_heat_map_shows_who_is_slow(rng: np.random.Generator, tmp_path: Path) -> None:
    ranks, slow = int(rng.integers(2, 9)), 1
    run = Run(make(tmp_path / "a", rng, ranks=ranks, epochs=9, slow=slow))
    grid, rows, last = phases.work(run)
    assert rows == 1 and last == 9 * 78 and len(grid) == ranks and not np.isnan(grid).any()
    assert int(grid.max(1).argmax()) == slow
    column = int(grid[slow].argmax()) / grid.shape[1]
    assert 3 / 9 - 0.02 <= column <= 7 / 9 + 0.02  # of the epochs in which it was
    many = Run(make(tmp_path / "b", rng, ranks=300, epochs=2, slow=299, lines=1))
    grid, rows, _ = phases.work(many)
    assert rows == 3 and grid.shape[0] == 100
    assert int(np.nanmax(grid, axis=1).argmax()) == 99
    label = phases.heat(many, "h")
    assert label is not None and "ranks 297 to 299" in label.svg


def test_colours_stand_out_by_day_and_night() -> None:
    def light(colour: str) -> float:
        part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    for shown in ({c: c for c in style.VARIABLES}, style.DARK):
        paper = shown[style.PAPER]
        assert min(contrast(shown[c], paper) for c in (style.INK, style.SOFT)) > 4.5
        assert min(contrast(shown[c], paper) for c in style.SERIES) >= 3
        assert len(set(shown.values())) == len(shown)


@pytest.mark.parametrize("extra", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(
    extra: str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "a", rng, epochs=1)
    monkeypatch.setitem(sys.modules, extra, None)
    said = report(folder, "-o", tmp_path / "page.html", code=2)
    assert said.count("\n") == 1 and f"needs {extra}: pip install 'mpidl[report]'" in said


def test_wrong_arguments_are_one_line(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=1)
    (tmp_path / "empty").mkdir()
    for words, says in (
        ((tmp_path / "empty",), "no run folder"),
        ((folder, tmp_path / "none\x1b[1m"), "none?[1m: no run folder"),
        ((folder, "-o", tmp_path), "expected a file"),
        ((folder, "-o", tmp_path / "no" / "page.html"), "expected a file"),
    ):
        said = report(*words, code=2)
        assert said.startswith("mpidl: ") and says in said and said.count("\n") == 1
    assert "RUN" in report("--help")


def test_a_page_replaces_the_last_one_whole(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make(tmp_path / "a", rng, epochs=1), tmp_path / "page.html"
    out.write_text("the last one")
    fail = OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(fail))
    assert "No space left" in report(folder, "-o", out, code=2)
    assert out.read_text() == "the last one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "page.html"]


def test_runs_of_the_same_name_are_told_apart(rng: np.random.Generator, tmp_path: Path) -> None:
    for name in ("x", "y"):
        make(tmp_path / name / "run", rng, epochs=1)
    report(tmp_path / "x/run", tmp_path / "y/run", "-o", tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text()).said["h1"] == ["x/run, y/run"]


def test_reading_needs_no_plots(rng: np.random.Generator, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As `mpidl watch` on a login node without the extra."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert name.split(".")[0] not in ("matplotlib", "jinja2")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    folder = make(tmp_path / "a", rng, epochs=1)
    result = CliRunner().invoke(app, ["watch", "--once", str(folder)])
    assert result.exit_code == 0, result.output
