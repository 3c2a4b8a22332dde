"""Site profiles: what all jobs of a cluster have in common. See launch/clusters/README.md."""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mpidl.cli import copy
from mpidl.cli.schedulers import SCHEDULERS
from mpidl.errors import InvalidArgument

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Profile:
    """A cluster. What is not set is the scheduler's, or the template's."""

    description: str = ""
    scheduler: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    ranks_per_node: int | None = None
    cpus_per_rank: int | None = None
    gpus_per_node: int | None = None
    stop_seconds: int = 120
    modules: tuple[str, ...] = ()  #: for "module load"
    setup: tuple[str, ...] = ()  #: lines of shell
    environment: tuple[tuple[str, str], ...] = ()
    launcher: tuple[str, ...] | None = None
    python: str | None = None
    container: str | None = None
    directives: tuple[str, ...] = ()


WORDS = ("modules", "setup", "launcher", "directives")
NUMBERS = ("ranks_per_node", "cpus_per_rank", "gpus_per_node", "stop_seconds")
KEYS = tuple(field.name for field in fields(Profile))


def folders() -> list[Path]:
    """Return where profiles lie: the user's own, and those that come with mpidl."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return [Path(home).expanduser() / "mpidl/clusters", copy.root() / "launch/clusters"]


def known() -> dict[str, Path]:
    """Return all profiles by name; the user's own come first."""
    found = (path for folder in reversed(folders()) for path in folder.glob("*.toml"))
    return {path.stem: path for path in found}


def load(name: str) -> Profile:
    """Return a profile by its name, or by its path. Raises InvalidArgument."""
    if "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
    elif name in known():
        path = known()[name]
    else:
        near = _nearest(name, known())
        raise InvalidArgument(f"profile {name!r}: expected one of {', '.join(known())}{near}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"profile {path}: {error}") from error
    try:
        return _checked(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, InvalidArgument) as error:
        raise InvalidArgument(f"profile {path}: {error}") from error


def _checked(table: dict[str, Any]) -> Profile:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in KEYS:
            raise InvalidArgument(
                f"unknown key {key!r}{_nearest(key, KEYS) or '; known: ' + ', '.join(KEYS)}"
            )
        if key in WORDS:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise InvalidArgument(f"{key}={value!r}: expected a list of strings")
            for line in value:
                one_line(key, line)
            if key == "launcher" and not value:
                raise InvalidArgument("launcher=[]: expected a command")
            values[key] = tuple(value)
        elif key == "environment":
            values[key] = _variables(value)
        elif key in NUMBERS:
            least = 0 if key == "gpus_per_node" else 10 if key == "stop_seconds" else 1
            if type(value) is not int or value < least:
                raise InvalidArgument(f"{key}={value!r}: expected a whole number, {least} or more")
            values[key] = value
        elif not isinstance(value, str):
            raise InvalidArgument(f"{key}={value!r}: expected a string")
        else:
            values[key] = one_line(key, value) if key != "description" else value
    if values.get("scheduler", "slurm") not in SCHEDULERS:
        near = _nearest(values["scheduler"], SCHEDULERS)
        raise InvalidArgument(
            f"scheduler={values['scheduler']!r}: expected one of {', '.join(SCHEDULERS)}{near}"
        )
    return Profile(**values)


def _variables(table: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(table, dict):
        raise InvalidArgument(f"environment={table!r}: expected a table")
    for name, value in table.items():
        if not VARIABLE.fullmatch(name):
            raise InvalidArgument(f"environment: {name!r} is no name of a variable")
        if not isinstance(value, str):
            raise InvalidArgument(f"environment: {name}={value!r}: expected a string")
    return tuple(table.items())


def one_line(what: str, text: str) -> str:
    """Return `text`. Raises InvalidArgument unless it is one line that can be read."""
    if not text or not all(c.isprintable() for c in text):
        raise InvalidArgument(f"{what} {text!r}: expected one line of printable characters")
    return text


def _nearest(name: str, names: Any) -> str:
    found = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
