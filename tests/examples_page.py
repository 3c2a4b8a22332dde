"""examples/README.md: what it says that an example prints at its end."""

from __future__ import annotations

import re

from tests import job

FOLDER = job.ROOT / "examples"
PAGE = (FOLDER / "README.md").read_text()
BLOCK = re.compile(r"^```\n\$ (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NUMBER = r"\d[\d,]*(?:\.\d+)?"


def commands() -> dict[str, list[str]]:
    """Return the last lines under each command of the page."""
    return {command: shown.splitlines() for command, shown in BLOCK.findall(PAGE)}


def last_line(name: str) -> re.Pattern[str]:
    """Return the pattern of an example's last line, in which any number may stand for another."""
    (shown,) = [lines for c, lines in commands().items() if f"examples/{name}" in c.split()]
    return re.compile(re.sub(NUMBER, lambda _: NUMBER, re.escape(shown[-1]).replace(r"\,", ",")))


def check(name: str, output: str) -> None:
    """Fail unless `output` ends as the page says."""
    lines = output.rstrip("\n").splitlines()
    assert lines and last_line(name).fullmatch(lines[-1]), f"{name}: {PAGE}\nbut: {output}"
