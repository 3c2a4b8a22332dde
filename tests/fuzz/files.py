"""Valid files of every kind that mpidl reads, and who reads them."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpidl import checkpoint, data, nn, testing, weights

ROWS = 5


def model() -> nn.Module:
    return nn.Linear(3, 2)


def idx(array: Any) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def make(folder: Path) -> None:
    """Write one file of each kind."""
    x = np.arange(3 * ROWS, dtype=np.float32).reshape(ROWS, 3)
    y = np.arange(ROWS)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.savez(folder / "both.npz", x=x, y=y)
    np.savez_compressed(folder / "small.npz", x=x, y=y)
    np.savez(folder / "weights.npz", **model().state_dict())
    weights.save(model(), folder / "weights.safetensors")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog \N{SNOWMAN}" * 4)
    (folder / "mnist").mkdir()
    for part in ("train", "t10k"):
        images = np.zeros((ROWS, 4, 4), np.uint8)
        (folder / f"mnist/{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"mnist/{part}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
    (folder / "cifar").mkdir()
    record = bytes(3073 * 2)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / "cifar" / name).write_bytes(record)
    faults = {"faults": [{"fault": "Slow", "rank": 1, "step": [2, 3], "seconds": 0.1}], "seed": 7}
    (folder / "faults.json").write_text(json.dumps(faults))
    if importlib.util.find_spec("h5py"):
        import h5py

        with h5py.File(folder / "both.h5", "w") as file:
            file["x"], file["y"] = x, y


def taken(dataset: Any) -> Any:
    return dataset.take(np.arange(len(dataset)))


#: For each file: what reads it, given its path. They raise errors of mpidl, or return.
READERS: dict[str, Callable[[Path], Any]] = {
    "both.h5": lambda path: taken(data.hdf5(path)),
    "both.npz": lambda path: taken(data.npz(path)),
    "cifar/test_batch.bin": lambda path: taken(data.cifar10(path.parent)[1]),
    "faults.json": lambda path: testing.parse(path.read_text(errors="surrogateescape")),
    "mnist/t10k-images-idx3-ubyte": lambda path: taken(data.mnist(path.parent)[1]),
    "small.npz": lambda path: taken(data.npz(path)),
    "text.txt": lambda path: taken(data.text(path, 5)[0]),
    "weights.npz": lambda path: weights.load(path, model()),
    "weights.safetensors": lambda path: weights.load(path, model()),
    "x.npy": lambda path: taken(data.npy(path, path.with_name("y.npy"))),
}


def of_checkpoint(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Return the files of a checkpoint in `folder`, each with what reads it."""
    return {
        str(path.relative_to(folder.parent)): lambda _: checkpoint.weights(folder)
        for path in sorted(folder.iterdir())
    }
