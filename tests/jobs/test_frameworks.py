"""examples/frameworks: the same training on 1 and 2 ranks, by each framework that is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpidl.array import device_namespace
from mpidl.errors import DeviceNotFound
from tests import examples_page, job

FOLDER = job.ROOT / "examples/frameworks"
EXAMPLES = {
    "chainer": ("chainer",),
    "cupy on the CPU": ("cupy", "--device", "cpu"),
    "cupy": ("cupy", "--device", "cuda"),
    "mxnet": ("mxnet",),
    "paddle": ("paddle",),
}
LINE = re.compile(r"rank (\d): test accuracy ([\d.]+)%, sum of scores ([\d.]+)")


def run(name: str, ranks: int, epochs: int) -> tuple[float, float]:
    """Return the accuracy in %, and the sum of all absolute scores: the same on all ranks."""
    framework, *options = EXAMPLES[name]
    line = (f"{FOLDER}/{framework}_digits.py", "--epochs", str(epochs), *options)
    result = job.run("openmpi", ranks, *line, timeout=120)
    assert result.status == 0, result
    examples_page.check("frameworks/cupy_digits.py", result.output)  # it stands for all
    told = {
        int(rank): (float(right), float(size)) for rank, right, size in LINE.findall(result.output)
    }
    assert set(told) == set(range(ranks)) and len(set(told.values())) == 1, result
    return told[0]


def why_not(name: str) -> str | None:
    """Return why an example cannot run here, if so."""
    if name == "cupy":
        try:
            device_namespace("cuda")
        except DeviceNotFound as error:
            return str(error)
    elif name != "cupy on the CPU" and find_spec(name) is None:
        return f"{name} is not installed; examples/frameworks/README.md says how it was"
    return None


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_ranks_learn_what_one_learns(name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        pytest.skip(reason)
    alone, together = run(name, 1, 3), run(name, 2, 3)
    assert together[0] == pytest.approx(alone[0], abs=100 * 1.5 / 359)  # one digit on the border
    assert together[1] == pytest.approx(alone[1], rel=1e-4)
    assert run(name, 2, 20)[0] >= 95


def test_every_example_is_run_and_told_of() -> None:
    files = {file.name for file in FOLDER.iterdir() if file.suffix == ".py"}
    assert files == {f"{framework}_digits.py" for framework, *_ in EXAMPLES.values()}
    page = Path(FOLDER / "README.md").read_text()
    assert [file for file in files if file not in page] == []
