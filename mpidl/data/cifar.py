"""CIFAR-10 in its binary version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpidl.data.dataset import ArrayDataset, ImageDataset
from mpidl.data.files import reading
from mpidl.errors import DataError
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.data.files import AnyPath

SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32  # a label; then red, green and blue, row by row
CLASSES = 10


@refuses
def cifar10(folder: AnyPath) -> tuple[ImageDataset, ImageDataset]:
    """Return CIFAR-10 as (train, test): x (n, 3, 32, 32) float32 in 0 to 1, y (n,) int64.

    `folder` holds data_batch_1.bin to data_batch_5.bin and test_batch.bin (Krizhevsky 2009). Raises
    DataError for a file that is missing, cut short, or has other labels than 0 to 9.
    """
    folder = Path(folder)
    train = np.concatenate([_records(folder / f"data_batch_{i}.bin") for i in range(1, 6)])
    return _part(train), _part(_records(folder / "test_batch.bin"))


def _records(path: Path) -> Array:
    """Return the records (n, 3073) uint8 of one file."""
    with reading(path, "a file of the binary version of CIFAR-10"):
        content = np.fromfile(path, np.uint8)
    if not content.size or content.size % RECORD_BYTES:
        raise DataError(
            f"{path} holds {content.size} bytes; expected a multiple of {RECORD_BYTES}, above 0"
        )
    records = content.reshape(-1, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if wrong.size:
        raise DataError(
            f"{path}: image {wrong[0]} has label {records[wrong[0], 0]}; expected 0 to 9"
        )
    return records


def _part(records: Array) -> ImageDataset:
    x = records[:, 1:].reshape(-1, *SHAPE)
    return ImageDataset(ArrayDataset(x, records[:, 0].astype(np.int64)))
