"""Data sets in .npy and .npz files, memory-mapped: only the rows that are taken are read."""

from __future__ import annotations

import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mpidl.errors import DataError
from mpidl.refuse import refuses

if TYPE_CHECKING:
    import os
    import zipfile
    from collections.abc import Iterator

    from mpidl.array import Array

AnyPath: TypeAlias = "str | os.PathLike[str]"

LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra field (APPNOTE.TXT, 4.3.7)
NUMBERS = "biufc"  # kinds of dtype that `take` may return


class Rows(Protocol):
    """An array (n, ...) that need not be in memory."""

    def __len__(self) -> int:
        """Return n."""

    def __getitem__(self, indices: Array, /) -> Array:
        """Return copies of the rows `indices` (k,), in native byte order."""


@dataclass(frozen=True)
class FileDataset:
    """Inputs x (n, ...) and targets y (n, ...) in files, of which `take` reads what it returns.

    Pickles as names and places in files, not as their content; other processes open them anew.
    """

    x: Rows
    y: Rows

    def __len__(self) -> int:
        return len(self.x)

    @refuses
    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return copies of the samples `indices` (n,), in the dtypes of the files."""
        return self.x[indices], self.y[indices]


class MappedRows:
    """The array (n, ...) at byte `offset` of a file, mapped when a row is first asked for."""

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool
    ) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.fortran = fortran
        self._map: Array | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Array, /) -> Array:
        if self._map is None:
            order: Any = "F" if self.fortran else "C"
            with reading(self.path, "the file that was opened before"):
                self._map = np.memmap(
                    self.path, self.dtype, "r", self.offset, self.shape, order
                ).view(np.ndarray)
        return _native(self._map[indices])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


@refuses
def npy(x_path: AnyPath, y_path: AnyPath) -> FileDataset:
    """Return the data set of two .npy files: inputs (n, ...) and targets (n, ...), as saved.

    Both are memory-mapped, so they may be larger than memory. Raises DataError for a file that is
    missing, cut short, or holds no array of numbers, and where the lengths differ.
    """
    return paired(_npy_rows(x_path), str(x_path), _npy_rows(y_path), str(y_path))


@refuses
def npz(path: AnyPath, x: str = "x", y: str = "y") -> FileDataset:
    """Return the data set of two arrays in a .npz file: inputs `x` (n, ...), targets `y` (n, ...).

    What `numpy.savez` wrote is memory-mapped where it lies in the file, unlike by `numpy.load`; the
    zip's checksums are not looked at. What `numpy.savez_compressed` wrote is read into memory, by
    every rank. Raises DataError as `npy` does, and where the file has no such array.
    """
    import zipfile

    path = Path(path)
    with reading(path, "a .npz file"):
        try:
            with zipfile.ZipFile(path) as archive:
                inputs, targets = (_npz_rows(path, archive, name) for name in (x, y))
        except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise DataError(f"{path}: {error}; expected a whole .npz file") from error
    return paired(inputs, f"{path}: {x!r}", targets, f"{path}: {y!r}")


def paired(x: Rows, x_name: str, y: Rows, y_name: str) -> FileDataset:
    """Return x and y as a data set. Raises DataError where they differ in length."""
    if len(x) != len(y):
        raise DataError(f"{y_name} has {len(y)} rows; expected {len(x)}, as {x_name} has")
    return FileDataset(x, y)


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Raise as DataError what the operating system says of the file or folder `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected {expected}") from error


def check_rows(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise DataError unless these are the shape and dtype of an array (n, ...) of numbers."""
    if dtype.kind not in NUMBERS:
        raise DataError(f"{name} has dtype {dtype}; expected numbers")
    if not shape:
        raise DataError(f"{name} is a single number; expected an array of one row per sample")


def _npy_rows(path: AnyPath) -> MappedRows:
    path = Path(path)
    with reading(path, "a .npy file"), path.open("rb") as file:
        return _mapped(path, file, path.stat().st_size, str(path))


def _npz_rows(path: Path, archive: zipfile.ZipFile, name: str) -> Rows:
    import zlib

    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    if name not in members:
        raise DataError(f"{path} has no array {name!r}; it has {listed(members)}")
    member, what = members[name], f"{path}: {name!r}"
    if member.compress_type == 0:
        with path.open("rb") as file:
            file.seek(member.header_offset + LOCAL_HEADER_BYTES - 4)
            start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(start)
            return _mapped(path, file, min(start + member.file_size, path.stat().st_size), what)
    try:
        with archive.open(member) as file:
            shape, fortran, dtype = _header(file, what)
            content = file.read()
    except (EOFError, RuntimeError, zlib.error) as error:  # RuntimeError: encrypted
        raise DataError(f"{what}: {error}; expected a whole compressed array") from error
    _check_size(what, shape, dtype, len(content))
    flat = np.frombuffer(content, dtype, count=math.prod(shape))
    return _native(flat.reshape(shape, order="F" if fortran else "C"))


def _mapped(path: Path, file: IO[bytes], end: int, what: str) -> MappedRows:
    """Return the array whose .npy header `file` stands at, and that may reach to byte `end`."""
    shape, fortran, dtype = _header(file, what)
    _check_size(what, shape, dtype, end - file.tell())
    return MappedRows(path.absolute(), file.tell(), shape, dtype, fortran)


def _header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a .npy header: shape, whether in Fortran's order, dtype (numpy.lib.format)."""
    import tokenize

    formats: Any = np.lib.format
    try:
        version = formats.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = formats.read_array_header_1_0(file)
        else:  # a version above 2.0 has field names only, which are no numbers
            shape, fortran, dtype = formats.read_array_header_2_0(file)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:  # as it is damaged
        raise DataError(f"{what}: {error}; expected an array as numpy.save writes it") from error
    check_rows(what, shape, dtype)
    return shape, fortran, dtype


def _check_size(what: str, shape: tuple[int, ...], dtype: np.dtype[Any], found: int) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if found < expected:
        raise DataError(
            f"{what} is cut short: {found} bytes of data; expected {expected}, for {shape} {dtype}"
        )


def _native(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def listed(names: Any) -> str:
    """Return the first few of `names`, sorted, for an error."""
    names = sorted(map(str, names))
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"
