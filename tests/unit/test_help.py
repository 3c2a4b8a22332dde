"""What `--help` shows, and what completes in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from mpidl.cli.app import app

COMMANDS = [
    (*parents, str(name))
    for parents, group in (
        ((), app),
        *(((group.name,), group.typer_instance) for group in app.registered_groups),
    )
    for name in typer.main.get_command(group).commands  # type: ignore[union-attr,arg-type,attr-defined]
    if (*parents, name) not in [(group.name,) for group in app.registered_groups]
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example(words: tuple[str, ...]) -> None:
    """Which is its own: its options are those that there are."""
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0
    shown = result.stdout.split("Options")[0]
    examples = re.findall(
        rf"^ *(?:Example: )?(mpidl {' '.join(words)} .*?) *$", shown, re.MULTILINE
    )
    assert examples, result.stdout
    for option in re.findall(r" (--[a-z-]+)", examples[-1].split(".py")[0]):
        assert option in result.stdout.split("Options")[1], option
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("mpidl su", "submit"), ("mpidl run --launcher mpi", "mpirun mpiexec")],
)
def test_the_shell_completes(typed: str, completed: str) -> None:
    """As the function that `mpidl --install-completion` gives to bash asks for it."""
    asks = {"_MPIDL_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    asks["COMP_CWORD"] = str(typed.count(" "))
    code = "import sys; sys.argv[0] = 'mpidl'; import mpidl.cli; mpidl.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asks},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == completed.split(), done
