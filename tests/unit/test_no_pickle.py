"""Nothing that comes from a file is unpickled, or run: who reads messages stands in one list."""

from __future__ import annotations

import ast
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl import checkpoint, data, nn, weights
from mpidl.errors import MpidlError
from tests.unit.test_imports import FILES, PACKAGE

#: What turns bytes into objects, or text into code.
READS = {"load", "loads", "Unpickler", "read_pickle", "exec", "eval", "compile", "run_path",
         "run_module"}  # fmt: skip
MODULES = {"pickle", "marshal", "cloudpickle", "dill", "joblib", "shelve", "torch", "yaml", "runpy"}
#: Who may, and whose bytes they are.
ALLOWED = {
    "collectives/messages.py": "other ranks' requests",
    "data/workers/parcel.py": "what the rank sends to its own workers",
    "data/workers/process.py": "the errors of the rank's own workers",
    "data/workers/script.py": "the rank's own script, for its workers",
    "testing/__main__.py": "the script that the user names",
    "torch/objects.py": "other ranks' objects: what Horovod's interface promises",
    "torch/session.py": "other ranks' values",
    "watchdog.py": "other ranks' reports",
}


def readers(source: str) -> set[str]:
    """Return the calls in `source` that could make an object, or run code, of bytes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in MODULES and node.attr in READS:
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in {"exec", "eval", "compile", "__import__"}:
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found |= {f"{node.module}.{a.name}" for a in node.names} & {
                f"{node.module}.{name}" for name in READS
            }
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            safe = node.arg == "weights_only"
            if not (isinstance(node.value, ast.Constant) and node.value.value is safe):
                found.add(f"{node.arg} is not {safe}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            found.add("np.load")  # its default is safe, but nobody sees it
    return found


def test_only_messages_are_unpickled() -> None:
    names = {str(path.relative_to(PACKAGE)): readers(path.read_text()) for path in FILES}
    assert {name: found for name, found in names.items() if found and name not in ALLOWED} == {}
    assert {name for name, found in names.items() if found} == set(ALLOWED), "no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.loads(b'')",
        "from pickle import load",
        "class A(pickle.Unpickler): pass",
        "torch.load(file, weights_only=False)",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=wanted)",
        "exec(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert readers(source)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def npy(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([bomb, bomb], object), allow_pickle=True)
    return file.getvalue()


def write_npz(path: Path, bomb: Bomb, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in ("x", "y", "weight", "bias"):
            archive.writestr(f"{name}.npy", npy(bomb))


def write_h5(path: Path, bomb: Bomb) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name in ("x", "y"):
            file[name] = np.void(pickle.dumps(bomb))
            file.create_dataset(f"of_{name}", (2,), h5py.special_dtype(vlen=np.uint8))


FORMS: dict[str, tuple[str, Callable[[Path, Bomb], Any], Callable[[Path], Any]]] = {
    "npy": ("x.npy", lambda p, b: p.write_bytes(npy(b)), lambda p: data.npy(p, p)),
    "npz": ("x.npz", lambda p, b: write_npz(p, b, 0), data.npz),
    "npz, packed": ("x.npz", lambda p, b: write_npz(p, b, 8), data.npz),
    "weights": ("x.npz", lambda p, b: write_npz(p, b, 0), lambda p: weights.load(p, linear())),
    "safetensors": (
        "x.safetensors",
        lambda p, b: p.write_bytes(pickle.dumps(b)),
        lambda p: weights.load(p, linear()),
    ),
    "checkpoint": (
        "step-00000001/manifest.json",
        lambda p, b: (p.parent.mkdir(), p.write_bytes(pickle.dumps(b))),
        lambda p: checkpoint.weights(p.parent),
    ),
    "hdf5": ("x.h5", write_h5, data.hdf5),
    "hdf5, vlen": ("x.h5", write_h5, lambda p: data.hdf5(p, "of_x", "of_y")),
    "idx": ("x.idx", lambda p, b: p.write_bytes(pickle.dumps(b)), data.read_idx),
    "text": ("x.txt", lambda p, b: p.write_bytes(pickle.dumps(b, 0)), lambda p: data.text(p, 3)),
}


def linear() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize("form", FORMS)
def test_no_file_runs_code(form: str, tmp_path: Path) -> None:
    name, write, read = FORMS[form]
    mark = tmp_path / "ran"
    bomb = Bomb(mark)
    write(tmp_path / name, bomb)
    if form == "text":  # text it is
        read(tmp_path / name)
    else:
        with pytest.raises(MpidlError):
            read(tmp_path / name)
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))
    assert mark.exists()
