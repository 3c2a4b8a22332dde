"""examples/notebook.ipynb, run by a kernel, and docs/pictures.md, on 2 ranks."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mpidl.cli import copy as copying
from tests import events, examples_page, job

NOTEBOOK = "examples/notebook.ipynb"

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=60, resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, sys.argv[1])
"""


def cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_it_comes_without_outputs() -> None:
    found = cells(job.ROOT / NOTEBOOK)
    assert found and all(c["outputs"] == [] and c["execution_count"] is None for c in found)


def test_it_runs(tmp_path: Path) -> None:
    missing = [
        name
        for name in ("nbclient", "ipykernel", "sklearn", "matplotlib")
        if find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    copying.copy(NOTEBOOK, tmp_path)
    settings = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    settings |= {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    line = (sys.executable, "-c", EXECUTE, NOTEBOOK)
    result = job.execute("openmpi", *line, cwd=tmp_path, timeout=100, **settings)
    assert result.status == 0, result
    script, ranks, history, plot, summary, accuracy, graph = cells(tmp_path / NOTEBOOK)
    folder = tmp_path
    assert "Writing train.py" in text(script)
    assert "2 ranks on 1 node" in text(ranks) and "epoch 12 of 12" in text(ranks)
    config = json.loads((folder / "run/config.json").read_text())
    assert config["ranks"] == 2

    last = job.epochs(folder / "run")[-1]
    examples_page.check("notebook.ipynb", text(accuracy))
    told = float(text(accuracy).split()[2].rstrip("%")) / 100
    assert told >= 0.95 and told == pytest.approx(last["metrics"]["accuracy"], abs=1e-4)
    (shown,) = history["outputs"]
    assert shown["data"]["text/plain"][0].startswith("History(12 epochs: loss ")
    assert "".join(shown["data"]["text/html"]).count("<tr>") == 13
    (shown,) = plot["outputs"]
    assert "image/png" in shown["data"]
    (shown,) = summary["outputs"]
    assert "<td" in "".join(shown["data"]["text/html"]) and "9,610" in str(shown["data"])
    (shown,) = graph["outputs"]
    drawn = shown["data"]["image/svg+xml" if shutil.which("dot") else "text/html"]
    for name in ("0.weight", "2.bias", "linear", "relu", "cross_entropy", "float32 (359, 10)"):
        assert name in "".join(drawn)


def text(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_code_of_the_page_runs(tmp_path: Path) -> None:
    if find_spec("tensorboardX") is None:
        pytest.skip("needs tensorboardX: pip install 'mpidl[report]'")
    page = (job.ROOT / "docs/pictures.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    script = job.script(
        tmp_path, 'import warnings\nwarnings.simplefilter("error")\n' + "".join(blocks)
    )
    result = job.run("openmpi", 2, script, cwd=tmp_path, timeout=60, OMP_NUM_THREADS="1")
    assert result.status == 0, result
    assert (tmp_path / "graph.dot").read_text().startswith("digraph")
    found = events.shown(events.read(tmp_path / "run/tensorboard"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    told = [line for line in map(json.loads, lines) if line.get("kind", "epoch") == "epoch"]
    assert found["loss/epoch"] == pytest.approx({e["steps"]: e["loss"] for e in told})
    assert list(found["first_digit"]) == [told[-1]["steps"]]
