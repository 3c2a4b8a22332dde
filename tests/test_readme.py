"""README.md tells the truth: its code runs on two ranks, its commands are those of the scripts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import job

README = (job.ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize(
    ("mpi", "number"),
    [
        *(("openmpi", number) for number in range(len(PYTHON))),
        ("mpich", 0),  # what the others call is tested with it elsewhere
        *(pytest.param("mpich", n, marks=pytest.mark.soak) for n in range(1, len(PYTHON))),
    ],
    indirect=["mpi"],
)
def test_code_runs(mpi: str, number: int, tmp_path: Path) -> None:
    result = job.run(mpi, 2, job.script(tmp_path, PYTHON[number]), cwd=tmp_path)
    assert result.status == 0, result
    if "% of" in result.output:
        assert float(result.output.split("%")[0]) > 90


def test_there_is_code() -> None:
    assert len(PYTHON) == 7


def test_a_strategy_of_ones_own_is_short() -> None:
    (block,) = [text for text in PYTHON if "STRATEGIES[" in text]
    body = block[block.index("class ") : block.index("STRATEGIES[")]
    assert len(body.strip().splitlines()) < 20


def test_the_two_commands_stand_first_and_ci_runs_the_second() -> None:
    first = README.index("```\nbash launch/quickstart.sh")
    assert README.index("```") == first
    second = re.search(r"^(bash tests/run\.sh)\b", README, re.M)
    assert second is not None
    assert second[1] in (job.ROOT / ".ci/run").read_text().splitlines()


def test_files_it_names_exist() -> None:
    names = re.findall(r"(?:launch|docs|tests|examples)/[\w./]+\w", README)
    assert names
    assert [name for name in names if not (job.ROOT / name).exists()] == []
