"""Damaged files: DataError, CheckpointError or InvalidArgument, or what was in them; no others."""

from __future__ import annotations

import faulthandler
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from mpidl import checkpoint
from mpidl.errors import MpidlError
from tests import job
from tests.conftest import ALL, SEED
from tests.fuzz import files

EXAMPLES = 400 if ALL else 12
SAVE = """
import sys
import mpidl
from mpidl import checkpoint, nn, optim
made = mpidl.DataParallel(nn.Linear(3, 2), optim.SGD(0.1, 0.9), "allreduce")
checkpoint.save(made, sys.argv[1])
made.close()
"""
#: What may stand in a JSON file in place of what is expected.
ODD = ("null", "[]", "{}", "-1", "1e999", "NaN", '"x"', "9" * 30, "[" * 2000, '"\\ud800"', "true")


def damage(draw: Any, content: bytes) -> bytes:
    """Cut, change, insert or repeat bytes; of JSON also replace a value."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "drop", "head", "value", "number"]))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    if kind == "drop":
        return content[:at] + content[at + draw(st.integers(1, 9)) :]
    if kind == "number":  # lengths and offsets are numbers of 4 and 8 bytes
        size = draw(st.sampled_from([4, 8]))
        number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
        raw = (number % 2 ** (8 * size)).to_bytes(size, draw(st.sampled_from(["little", "big"])))
        return content[:at] + raw + content[at + size :]
    if kind == "value" and b":" in content:
        places = [i for i, byte in enumerate(content) if byte == ord(":")]
        start = draw(st.sampled_from(places)) + 1
        stop = next((i for i in range(start, len(content)) if content[i : i + 1] in b",}"), start)
        odd = draw(st.sampled_from(ODD)).encode()
        return content[:start] + odd + content[stop:]
    return draw(st.binary(max_size=16)) + content[draw(st.integers(0, 16)) :]


def attempt(path: Path, read: Callable[[Path], Any], number: int, examples: int) -> None:
    content = path.read_bytes()

    @hypothesis.seed(SEED + number)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.data())
    def test(data: Any) -> None:
        path.write_bytes(damage(data.draw, content))
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except (MpidlError, MemoryError):
            pass
        finally:
            faulthandler.cancel_dump_traceback_later()

    try:
        test()
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", files.READERS)
def test_damaged(name: str, tmp_path: Path) -> None:
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
    files.make(tmp_path)
    files.READERS[name](tmp_path / name)
    attempt(tmp_path / name, files.READERS[name], list(files.READERS).index(name), EXAMPLES)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = job.script(tmp_path, SAVE)
    result = job.run("openmpi", 1, script, str(folder))
    assert result.status == 0, result
    [path] = folder.glob("step-*")
    whole = checkpoint.weights(path)
    assert set(whole) == {"weight", "bias"}
    for number, file in enumerate(sorted(path.iterdir())):
        attempt(file, lambda file: checkpoint.weights(file.parent), 100 + number, 3 * EXAMPLES)
    assert set(checkpoint.weights(path)) == set(whole)
    manifest = path / "manifest.json"
    for key in json.loads(manifest.read_text()):
        told = json.loads(manifest.read_text())
        for value in (None, -1, "x", [], {}, [[]], {"a": {}}, 2**70, 1e300, True):
            copy = tmp_path / "copy" / path.name
            shutil.copytree(path, copy)
            (copy / "manifest.json").write_text(json.dumps({**told, key: value}))
            try:
                checkpoint.weights(copy)
            except MpidlError:
                pass
            finally:
                shutil.rmtree(copy)
