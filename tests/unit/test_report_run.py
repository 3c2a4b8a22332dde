"""Run folders that are damaged, half written, old, or of a run that went on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument
from mpidl.report.drawing import thin
from mpidl.report.page import page
from mpidl.report.run import Run
from tests.unit.pages import Page
from tests.unit.run_folders import make, write


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder / "metrics.jsonl") if line["kind"] == "epoch"]


def test_what_is_written_is_read(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, ranks=3, epochs=4)
    run = Run(folder)
    given = epochs_of(folder)
    assert [e.epoch for e in run.epochs] == [1, 2, 3, 4]
    for made, line in zip(run.epochs, given, strict=True):
        assert made.metrics == line["metrics"] and made.phases == line["phases"]
        assert made.noise["scale"] == line["noise"]["scale"]
        assert made.moved_bytes == line["moved_bytes"]
    assert len(run.steps) == 32 and run.ranks == 3 and run.damaged == {}
    for phase, seconds in run.phases().items():
        np.testing.assert_allclose(seconds, np.sum([e["phases"][phase] for e in given], axis=0))
    assert run.updates() == given[-1]["steps"]
    assert [t.seconds["wait"].shape for t in run.times] == [(3, 8)] * 4


@pytest.mark.parametrize("files", ["each", "all"])
def test_a_file_that_is_cut_anywhere(files: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Also of a disk that was full: any prefix of any file, or of all."""
    whole = make(tmp_path / "whole", rng, ranks=2, epochs=2, lines=2)
    names = [path.name for path in whole.iterdir()]
    for i in range(3 if files == "each" else 12):
        for name in names if files == "each" else [""]:
            folder = tmp_path / f"{i}-{name}"
            folder.mkdir()
            for path in whole.iterdir():
                data = path.read_bytes()
                cut = name in ("", path.name)
                end = int(rng.integers(0, len(data))) if cut else len(data)
                (folder / path.name).write_bytes(data[:end])
            run = Run(folder)
            kept = (folder / "metrics.jsonl").read_bytes().count(b"\n")
            assert len(run.steps) + len(run.epochs) == kept and run.damaged == {}
            if i == 0 and (files == "all" or name == "times.jsonl"):
                Page(page([run]))


def test_values_that_are_none_of_theirs(rng: np.random.Generator, tmp_path: Path) -> None:
    """A page comes out, whatever stands where a number should be."""
    folder = make(tmp_path / "a", rng, ranks=2, epochs=3, lines=3)
    odd = [None, "x", "nan", "inf", -1, 10**400, True, [], {}, [None], {"a": None}, 1e308, "\0"]

    def spoil(value: Any) -> Any:
        if rng.random() < 0.15:
            return odd[int(rng.integers(len(odd)))]
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    files = {path: lines_of(path) for path in folder.iterdir()}
    for _ in range(3):
        for path, given in files.items():
            write(path, [{k: spoil(v) for k, v in line.items()} for line in given])
        Page(page([Run(folder), Run(make(tmp_path / "b", rng, epochs=1))]))
    for text in (b"\xff\xfe\n[]\n7\n\n" + b"[" * 100_000 + b"\n", b"\0" * 5000, b"{}\n" * 3):
        for path in files:
            path.write_bytes(text)
        run = Run(folder)
        assert (run.steps, run.epochs, run.times) == ([], [], [])
        assert run.damaged.get("metrics.jsonl", 0) == (4 if text.startswith(b"\xff") else 0)
        assert "no epoch is over yet" in " ".join(Page(page([run])).said["p"])


def test_an_old_run_has_epochs_and_no_more(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=3, lines=0)
    names = ("epoch", "steps", "loss", "metrics", "seconds", "samples_per_second")
    old = [{name: line[name] for name in names} for line in epochs_of(folder)]
    write(folder / "metrics.jsonl", old)
    (folder / "times.jsonl").unlink()
    (folder / "summary.json").unlink()
    run = Run(folder)
    assert [e.loss for e in run.epochs] == [e["loss"] for e in old]
    assert run.phases() == {} and math.isnan(run.updates())
    found = Page(page([run]))
    assert [h for h in found.said["h3"] if h] == ["Loss", "Accuracy", "Throughput"]
    assert any("wrote no times" in p for p in found.said["p"])


def test_losses_that_are_no_numbers(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=4)
    lines = lines_of(folder / "metrics.jsonl")
    for line in lines[len(lines) // 2 :]:
        line["loss"] = ("nan", "inf", "-inf")[int(rng.integers(3))]
    write(folder / "metrics.jsonl", lines)
    run = Run(folder)
    assert not math.isfinite(run.epochs[-1].loss) and math.isfinite(run.epochs[0].loss)
    text = page([run])
    assert "Gaps are losses that are no numbers (a)" in text
    assert Page(text).table("Epochs").rows[-1][2] in ("nan", "inf", "-inf")


def test_a_run_that_went_on(rng: np.random.Generator, tmp_path: Path) -> None:
    """Twice: the first file tells of steps that were lost with a checkpoint not written."""
    folder = make(tmp_path / "a", rng, ranks=4, epochs=5)
    for number, (first, ranks) in enumerate(((3, 2), (4, 3)), 1):
        for name in ("metrics.jsonl", "times.jsonl"):
            (folder / name).rename(folder / f"{name}.{number}")
        make(folder, rng, ranks=ranks, epochs=3, first=first)
    run = Run(folder)
    assert [e.epoch for e in run.epochs] == [1, 2, 3, 4, 5, 6, 7]
    ranks = [len(e.phases["compute"]) for e in run.epochs]
    assert ranks == [4, 4, 4, 2, 3, 3, 3] and run.ranks == 3
    steps = [s.step for s in run.steps]
    assert steps == sorted(set(steps)) and len(steps) == 7 * 8
    assert [t.epoch for t in run.times] == [1, 2, 3, 4, 5, 6, 7]
    assert len(run.phases()["wait"]) == 4
    Page(page([run]))


def test_a_run_that_began_anew(rng: np.random.Generator, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rng, epochs=5)
    (folder / "metrics.jsonl").rename(folder / "metrics.jsonl.1")
    make(folder, rng, epochs=2)
    run = Run(folder)
    assert [e.epoch for e in run.epochs] == [1, 2] and len(run.steps) == 16
    lines = lines_of(folder / "metrics.jsonl")
    write(folder / "metrics.jsonl", epochs_of(folder))  # and of one without steps
    assert [e.epoch for e in Run(folder).epochs] == [1, 2]
    assert Run(folder).steps == []
    write(folder / "metrics.jsonl", lines[:3])  # and of one whose first epoch goes on
    assert Run(folder).epochs == [] and len(Run(folder).steps) == 3


def test_an_epoch_may_end_before_the_first_line_of_steps(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [
        {"kind": "epoch", "epoch": 1, "steps": 23, "loss": 1.0},
        {"kind": "steps", "step": 24, "count": 24, "loss": 0.9},
        {"kind": "epoch", "epoch": 2, "steps": 46, "loss": 0.8},
    ])  # fmt: skip
    assert [e.epoch for e in Run(tmp_path).epochs] == [1, 2]


def test_steps_made_again_count_once(tmp_path: Path) -> None:
    """After ranks have died: in the same file."""
    numbers = [10, 20, 30, 15, 25]
    write(tmp_path / "metrics.jsonl", [{"kind": "steps", "step": n, "count": 10, "loss": n}
                                       for n in numbers])  # fmt: skip
    assert [s.step for s in Run(tmp_path).steps] == [10, 15, 25]


def test_a_run_is_followed(rng: np.random.Generator, tmp_path: Path) -> None:
    """In whatever pieces its lines arrive; and again from the start where it begins anew."""
    whole = make(tmp_path / "whole", rng, epochs=3)
    folder = tmp_path / "a"
    folder.mkdir()
    file = folder / "metrics.jsonl"
    file.write_bytes(b"")
    run, data = Run(folder), (whole / "metrics.jsonl").read_bytes()
    assert run.epochs == []
    ends = sorted(int(n) for n in rng.integers(0, len(data), 9))
    for begin, end in zip([0, *ends], [*ends, len(data)], strict=True):
        with file.open("ab") as out:
            out.write(data[begin:end])
        run.look()
        assert len(run.steps) + len(run.epochs) == data[:end].count(b"\n")
    assert run.epochs == Run(whole).epochs and run.steps == Run(whole).steps
    file.rename(folder / "metrics.jsonl.1")
    run.look()
    assert len(run.epochs) == 3
    for epochs in (1, 5):  # shorter, and longer than what was read
        make(folder, rng, epochs=epochs)
        run.look()
        assert len(run.epochs) == epochs and len(run.steps) == 8 * epochs
        assert run.epochs == Run(folder).epochs
        file.rename(folder / f"metrics.jsonl.{epochs + 1}")


@pytest.mark.parametrize(
    "shape",
    [
        {"ranks": 1, "epochs": 1, "steps": 1},
        {"ranks": 512, "epochs": 2, "lines": 1},
        {"ranks": 2, "epochs": 800, "lines": 1},
        {"epochs": 0, "ended": False, "lines": 0},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, Any], rng: np.random.Generator, tmp_path: Path) -> None:
    text = page([Run(make(tmp_path / "a", rng, **shape))])
    found = Page(text)
    assert len(text) < 1e6
    for table in found.tables:
        assert len(table.rows) <= max(201, shape.get("ranks", 0) + 1)
    if shape["epochs"] == 800:
        assert [row[0] for row in found.table("Epochs").rows][-1] == "800"
        assert "200 of 800" in text


def test_a_thin_line_keeps_its_ends_and_peaks(rng: np.random.Generator) -> None:
    n = int(rng.integers(500, 20_000))
    y = rng.normal(size=n)
    y[rng.integers(0, n, 5)] = np.nan
    low, high = int(np.nanargmin(y)), int(np.nanargmax(y))
    x, kept = thin(np.arange(n, dtype=float), y)
    assert len(x) <= 402 and (np.diff(x) > 0).all()
    assert {0, n - 1, low, high} <= set(x.astype(int))
    np.testing.assert_array_equal(kept, y[x.astype(int)])


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "a\x1b"):
        with pytest.raises(InvalidArgument, match="no run folder: expected one that Trainer"):
            Run(path)
