"""The code of docs/ is whole, and runs on 2 ranks: that of all pages in one job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import job

DOCS = job.ROOT / "docs"
#: Tests of their own run what stands in these.
ELSEWHERE = {"checkpoints.md", "frameworks.md", "same_bits.md"}

ALL = """
from pathlib import Path
import mpidl

for path in sorted(Path().glob("*.block")):
    exec(compile(path.read_text(), path.name, "exec"), {"__name__": "__main__"})
print(mpidl.init().rank, "is through")
"""


def blocks() -> dict[str, str]:
    """Return the code of all other pages, by page and number."""
    return {
        f"{page.stem}-{number}.block": code
        for page in sorted(DOCS.glob("*.md"))
        if page.name not in ELSEWHERE
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        )
    }


def test_code_of_the_pages_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = blocks()
    assert len(found) >= 11
    for name, code in found.items():
        (tmp_path / name).write_text(code)
    script = job.script(tmp_path, ALL)
    result = job.run("openmpi", 2, script, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.status == 0, result
    assert sorted(re.findall(r"(\d) is through", result.output)) == ["0", "1"], result
