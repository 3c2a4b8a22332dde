"""Public functions, given what nobody should give them: errors of mpidl, and no others.

A group of them at a time, in a child process: where the interpreter crashes, or a call does not
end, the call is told. MPIDL_TEST_SEED repeats a run; MPIDL_TEST_ALL=1 takes longer.
"""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import job
from tests.conftest import ALL, SEED
from tests.fuzz import names
from tests.fuzz.calls import Journal

GROUPS = tuple(names.PACKAGES)
EXAMPLES = 100 if ALL else 6
SECONDS = 280


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=job.ROOT,
        env={**job.environment("openmpi"), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def fuzz(group: str, tmp_path: Path, *options: str) -> None:
    journal = tmp_path / "journal"
    found = run("-m", "tests.fuzz", group, str(journal), "--seed", str(SEED), *options)
    if found.returncode:
        last = Journal.read(journal) if journal.exists() else ""
        ended = f"ended by {found.returncode} in: {last}\n" if last else ""
        pytest.fail(f"{ended}{found.stdout}{found.stderr[-4000:]}", pytrace=False)


@pytest.mark.parametrize("group", GROUPS)
def test_only_documented_errors(group: str, tmp_path: Path) -> None:
    fuzz(group, tmp_path, "--examples", str(EXAMPLES))


@pytest.mark.soak
@pytest.mark.parametrize("group", GROUPS)
def test_each_hostile_value_in_each_place(group: str, tmp_path: Path) -> None:
    fuzz(group, tmp_path, "--all")


def test_every_public_function_is_fuzzed() -> None:
    """A new one needs an entry in tests/fuzz/tables, or a reason in `names.INTERNAL`."""
    known = {name for group in GROUPS for name in table(group)}
    public = {name for group in GROUPS for name in names.of_group(group)}
    missing = {n for n in public - known if not reasons(n)}
    assert missing == set()
    assert known - public == set(), "these are no longer public"


def test_every_reason_is_one() -> None:
    public = {name for group in GROUPS for name in names.of_group(group)}
    used = {pattern for name in public for pattern in reasons(name)}
    assert set(names.INTERNAL) - used == set()


def reasons(name: str) -> list[str]:
    return [pattern for pattern in names.INTERNAL if fnmatch.fnmatchcase(name, pattern)]


def table(group: str) -> list[str]:
    """Return the names in a table, read as text: to import it may start MPI."""
    path = Path(__file__).parent / "tables" / f"{group}.py"
    tree = ast.parse(path.read_text())
    found: list[str] = []
    for node in tree.body:
        target = getattr(node, "target", None)
        if getattr(target, "id", "") == "TABLE":
            keys: Any = node.value.keys  # type: ignore[attr-defined]
            found += [key.value for key in keys]
    assert found
    return found


def test_what_is_not_caught_is_told(tmp_path: Path) -> None:
    """The harness itself: a wrong error, and a crash, fail with their arguments."""
    code = f"""
import os, sys
from pathlib import Path
from mpidl.errors import InvalidArgument
from tests.fuzz import calls, names
def bad(x):
    if x == 1: raise KeyError(x)
    if x == 2: raise InvalidArgument("no")
    if x == 3: os.kill(os.getpid(), 11)
names.resolve = lambda _: bad
journal = calls.Journal(Path({str(tmp_path / "journal")!r}))
one = lambda n: calls.check("bad", lambda: calls.given(0), {{0: (str(n), lambda: n)}}, journal)
one(0), one(2)
try: one(1)
except calls.Escaped as error: print(error, flush=True)
one(3)
"""
    found = run("-c", code)
    assert found.returncode == -11
    assert found.stdout.strip() == "bad with 0=1: KeyError: 1"
    assert Journal.read(tmp_path / "journal") == "bad with 0=3"
