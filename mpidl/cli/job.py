"""One job: what `mpidl submit` was asked for, and its script, made from a template of launch/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

BEGIN, END = "# --- environment", "# --- end of environment"


@dataclass(frozen=True)
class Job:
    """What a job is to be. All numbers are checked, and all names, before one is made."""

    name: str
    folder: Path  #: of the run, absolute
    cwd: Path  #: where the program runs, absolute
    command: tuple[str, ...]  #: of one rank
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    gpus_per_node: int = 0
    seconds: int = 3600  #: the time limit
    stop_seconds: int = 120  #: how long before it the ranks get a signal
    array: str | None = None
    account: str | None = None
    partition: str | None = None
    container: str | None = None
    launcher: tuple[str, ...] | None = None  #: None: that of the template
    environment: tuple[str, ...] = ()  #: lines of shell, from the profile
    options: tuple[str, ...] = ()  #: more directives, as the scheduler writes them

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.ranks_per_node


def quote(word: str) -> str:
    """Return `word` for bash, on one line: some schedulers read every line of a script."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    coded = (c if c.isprintable() else "".join(map(_octal, _encode(c))) for c in escaped)
    return "$'" + "".join(coded) + "'"


def quote_with_variables(word: str) -> str:
    """Return `word` of a profile for bash, in which $NAME stays a variable of the job."""
    if not re.search(r"\$[A-Z_]", word):
        return quote(word)
    parts = re.split(r"(\$[A-Z_][A-Z0-9_]*)", word)
    return "".join(f'"{p}"' if i % 2 else quote(p) if p else "" for i, p in enumerate(parts))


def array(words: Iterable[str]) -> str:
    """Return words, quoted already, as a bash array."""
    return f"({' '.join(words)})"


def settings(job: Job, container: Iterable[str]) -> dict[str, str]:
    """Return the lines that all job scripts have, as beginning -> rest."""
    lines = {
        "cd ": quote(str(job.cwd)),
        "run=": quote(str(job.folder)),
        "command=(": array(map(quote, job.command))[1:],
        "container=": array(map(quote, container)),
    }
    if job.launcher is not None:
        lines["launcher="] = array(map(quote_with_variables, job.launcher))
    return lines


def fill(
    template: str,
    title: str,
    prefix: str,
    directives: Mapping[str, str | None],
    lines: Mapping[str, str],
    job: Job,
) -> str:
    """Return a template with the values of a job.

    A directive is a line of `prefix` and a key of `directives`, such as "#SBATCH" and "--nodes=",
    which gets another value, or goes where that is None; those that the template has not follow
    the others, and then the job's own options. A line that begins with a key of `lines` gets that
    rest. Comments behind two spaces stay. The block of the environment is replaced as a whole.
    Raises InvalidArgument where a line for one of `lines` is missing.
    """
    new, directives, missing = [], dict(directives), dict(lines)
    inside = last = 0
    text = iter(template.splitlines())
    for line in text:
        if line.startswith(BEGIN):
            new += [BEGIN, *job.environment, END]
            inside = 1
        elif line.startswith(END):
            inside = 0
        elif not inside and line.startswith(f"{prefix} "):
            key = next((k for k in directives if line.startswith(f"{prefix} {k}")), None)
            if key is None:
                new.append(line)
            elif (value := directives.pop(key)) is not None:
                new.append(f"{prefix} {key}{value}{_comment(line)}")
            last = len(new)
        elif not inside:
            key = next((k for k in missing if line.startswith(k)), None)
            new.append(line if key is None else f"{key}{missing.pop(key)}{_comment(line)}")
            if key is not None and line.count("(") > line.count(")"):  # an array on more lines
                while not next(text).endswith(")"):
                    pass
    if missing:
        raise InvalidArgument(f"{title}: no line that begins with {', '.join(missing)}")
    more = [f"{prefix} {key}{value}" for key, value in directives.items() if value is not None]
    new[last:last] = more + [f"{prefix} {option}" for option in job.options]
    first = next(i for i, line in enumerate(new) if line.startswith(f"{prefix} "))
    return "\n".join([new[0], f"# {title}", *new[first:]]) + "\n"


def _comment(line: str) -> str:
    _, mark, text = line.partition("  #")
    return f"{mark}{text}" if mark else ""


def _encode(character: str) -> bytes:
    return character.encode(errors="surrogateescape")


def _octal(byte: int) -> str:
    return f"\\{byte:03o}"
