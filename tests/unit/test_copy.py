"""`mpidl copy`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mpidl.cli import copy as copying
from mpidl.cli.app import app
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT, OPTIONS = "examples/digits_mlp.py", "examples/options.py"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_available() -> None:
    names = copying.available()
    assert {SCRIPT, OPTIONS} <= set(names)
    assert names == sorted(set(names))
    for name in names:
        assert name.split("/")[0] in copying.FOLDERS
        assert (copying.root() / name).is_file()
        assert "__pycache__" not in name


def test_no_folder_hides_a_framework() -> None:
    """A script beside a folder "torch" would import that, where PyTorch is not installed."""
    folders = {path.name for path in (copying.root() / "examples").iterdir() if path.is_dir()}
    names = {"torch", "jax", "keras", "tensorflow", "horovod", "mxnet", "chainer", "paddle", "cupy"}
    assert folders and not folders & names


def test_a_file_brings_the_options_along(tmp_path: Path) -> None:
    written = copying.copy(SCRIPT, tmp_path)
    assert written == [tmp_path / SCRIPT, tmp_path / OPTIONS]
    for name in (SCRIPT, OPTIONS):
        assert (tmp_path / name).read_bytes() == (copying.root() / name).read_bytes()
    assert files(tmp_path) == [SCRIPT, OPTIONS]


def test_options_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / OPTIONS).write_text("mine")
    assert copying.copy(SCRIPT, tmp_path) == [tmp_path / SCRIPT]
    assert (tmp_path / OPTIONS).read_text() == "mine"


@pytest.mark.parametrize("name", ["examples", "examples/"])
def test_a_folder(name: str, tmp_path: Path) -> None:
    written = copying.copy(name, tmp_path / "deep/down")
    expected = [f for f in copying.available() if f.startswith("examples/")]
    assert files(tmp_path / "deep/down") == expected
    assert sorted(written) == sorted(tmp_path / "deep/down" / f for f in expected)


@pytest.mark.parametrize("name", [SCRIPT, "examples"])
def test_no_file_is_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / SCRIPT).write_text("mine")
    message = re.escape(f"already there, not written over: {tmp_path / SCRIPT}")
    with pytest.raises(InvalidArgument, match=message):
        copying.copy(name, tmp_path)
    assert files(tmp_path) == [SCRIPT], "nothing is copied where not all can be"
    assert (tmp_path / SCRIPT).read_text() == "mine"


@pytest.mark.parametrize("name", ["digits", "exam", "", "../README.md", "/etc/passwd", "tests"])
def test_an_unknown_name_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    message = f"no {re.escape(repr(name))} to copy; there are: .*{SCRIPT}"
    with pytest.raises(InvalidArgument, match=message):
        copying.copy(name, tmp_path)
    assert files(tmp_path) == []


def test_the_command_lists_copies_and_refuses(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["copy"]).stdout.splitlines() == copying.available()
    arguments = ["copy", SCRIPT, "--to", str(tmp_path)]
    first = run(app, arguments)
    assert first.exit_code == 0
    assert first.stdout.splitlines() == [str(tmp_path / SCRIPT), str(tmp_path / OPTIONS)]
    second = run(app, arguments)
    assert second.exit_code == 2
    assert second.stderr.split()[:6] == ["mpidl:", "already", "there,", "not", "written", "over:"]
