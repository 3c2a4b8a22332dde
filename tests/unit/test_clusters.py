"""Site profiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpidl.cli import clusters
from mpidl.cli.app import app
from mpidl.errors import InvalidArgument

SAMPLES = sorted((Path(__file__).parents[2] / "launch/clusters").glob("*.toml"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config/mpidl/clusters"


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_can_be_read_and_make_scripts(path: Path) -> None:
    profile = clusters.load(path.stem)
    assert profile == clusters.load(str(path))
    assert profile.description
    Path("train.py").touch()
    words = ["submit", "--profile", path.stem, "--scheduler", str(profile.scheduler)]
    made = CliRunner().invoke(app, [*words, "--nodes", "2", "--dry-run", "train.py"])
    assert made.exit_code == 0, made.stderr
    lines = made.stdout.splitlines()
    assert f"module load {profile.modules[-1]}" in lines
    launcher = next(line for line in lines if line.startswith("launcher="))
    assert launcher.startswith(f"launcher=({(profile.launcher or ())[0]} ")
    assert "{" not in launcher, "all numbers are known"
    for name, value in profile.environment:
        assert f"export {name}={value}" in lines


def test_the_table_of_keys_is_whole() -> None:
    readme = (SAMPLES[0].parent / "README.md").read_text()
    keys = re.findall(r"^\| (`.*?) \| ", readme, re.MULTILINE)
    named = {name for row in keys for name in re.findall(r"`(\w+)`", row)}
    assert named == set(clusters.KEYS)
    assert {path.name for path in SAMPLES} == set(re.findall(r"^\| (\w+\.toml) ", readme, re.M))


def test_ones_own_come_first(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "intel_mpi.toml").write_text('description = "mine"')
    assert clusters.load("intel_mpi").description == "mine"
    (home / "other.toml").write_text("nodes_per_rank = 1")
    with pytest.raises(InvalidArgument, match=r"other.toml: unknown key 'nodes_per_rank'; did you"):
        clusters.load("other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks_per_nodes = 4", "unknown key 'ranks_per_nodes'; did you mean 'ranks_per_node'?"),
        ("zzz = 4", "unknown key 'zzz'; known: description, scheduler, "),
        ('ranks_per_node = "4"', "ranks_per_node='4': expected a whole number, 1 or more"),
        ("ranks_per_node = true", "expected a whole number, 1 or more"),
        ("cpus_per_rank = 0", "cpus_per_rank=0: expected a whole number, 1 or more"),
        ("gpus_per_node = -1", "gpus_per_node=-1: expected a whole number, 0 or more"),
        ("stop_seconds = 3", "stop_seconds=3: expected a whole number, 10 or more"),
        ('scheduler = "slrum"', "expected one of slurm, pbs, .*; did you mean 'slurm'?"),
        ('modules = "a"', "modules='a': expected a list of strings"),
        ("modules = [1]", "expected a list of strings"),
        ("launcher = []", "launcher=.*: expected a command"),
        ("partition = 3", "partition=3: expected a string"),
        ('environment = "A=b"', "environment='A=b': expected a table"),
        ('[environment]\n"A B" = "c"', "'A B' is no name of a variable"),
        ("[environment]\nA = 1", "A=1: expected a string"),
        ("a = ", "site.toml: Invalid value"),
    ],
)
def test_what_a_profile_cannot_be(text: str, message: str) -> None:
    Path("site.toml").write_text(text)
    with pytest.raises(InvalidArgument, match=message.replace("?", r"\?")):
        clusters.load("site.toml")


def test_profiles_that_are_not_there() -> None:
    with pytest.raises(InvalidArgument, match=r"expected one of .*; did you mean 'intel_mpi'\?"):
        clusters.load("intelmpi")
    with pytest.raises(InvalidArgument, match="No such file"):
        clusters.load("./site.toml")
