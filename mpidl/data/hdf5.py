"""Data sets in HDF5 files, of which each rank reads the rows that it takes."""

from __future__ import annotations

import importlib
import math
import os
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.data.dataset import numbers_of
from mpidl.data.files import check_rows, listed, paired, reading
from mpidl.errors import DataError, MpidlError
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.data.files import AnyPath, FileDataset


GAP_BYTES = 1 << 14  # reading this much for nothing takes no longer than another call


class Hdf5Rows:
    """The data set (n, ...) called `name` in an HDF5 file, opened once in each process that reads.

    HDF5's handles may not cross a fork, and cannot be pickled. Rows are read in rising order, those
    that lie close together at once: h5py's selection by a list is slower, on chunked data by far.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.name, self.shape, self.dtype = path, name, shape, dtype
        self._opened: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Array, /) -> Array:
        rows, back = np.unique(numbers_of(indices, len(self)), return_inverse=True)
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        near = max(1, GAP_BYTES // max(1, self.dtype.itemsize * math.prod(self.shape[1:])))
        begins = np.flatnonzero(np.diff(rows, prepend=-near - 1) > near)
        with _reading(self.path, f"to read {self.name!r} as when it was opened"):
            for start, stop in pairwise([*begins, len(rows)]):
                first, last = int(rows[start]), int(rows[stop - 1])
                span = self._dataset()[first : last + 1]
                found[start:stop] = span[rows[start:stop] - first]
        return found[back]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _dataset(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open(self.path)[self.name]
        return self._opened[1]


@refuses
def hdf5(path: AnyPath, x: str = "x", y: str = "y") -> FileDataset:
    """Return the data set of two HDF5 data sets: inputs `x` (n, ...) and targets `y` (n, ...).

    They may be larger than memory, chunked and compressed; names like "train/x" lead into groups.
    `take` is quickest where the rows it is asked for lie together in the file. Raises DataError for
    a file that is missing or not HDF5, without such a data set of numbers, and where the lengths
    differ; MpidlError where h5py is missing.
    """
    path = Path(path).absolute()
    with _reading(path, "an HDF5 file"):
        path.open("rb").close()  # HDF5's own words for a missing file are many
        with _open(path) as file:
            inputs, targets = (_rows(path, file, name) for name in (x, y))
    return paired(inputs, f"{path}: {x!r}", targets, f"{path}: {y!r}")


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Raise as DataError what h5py says of the file `path`: all of these, where it is damaged."""
    try:
        with reading(path, expected):
            yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}; expected {expected}") from error


def _open(path: Path) -> Any:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise MpidlError("data.hdf5 needs h5py: pip install 'mpidl[hdf5]'") from error
    # Parallel file systems may be mounted without locks, and many ranks only read.
    return h5py.File(path, "r", locking="best-effort")


def _rows(path: Path, file: Any, name: str) -> Hdf5Rows:
    found = file.get(name)
    if not hasattr(found, "shape"):  # None, or a group
        names: list[str] = []
        file.visititems(lambda key, value: names.append(key) if hasattr(value, "shape") else None)
        raise DataError(f"{path} has no data set {name!r}; it has {listed(names)}")
    check_rows(f"{path}: {name!r}", found.shape or (), found.dtype)
    return Hdf5Rows(path, name, found.shape, found.dtype.newbyteorder("="))
