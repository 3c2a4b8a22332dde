"""IDX files, in which MNIST and its kin come."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpidl.data.dataset import ArrayDataset, ImageDataset
from mpidl.data.files import listed, reading
from mpidl.errors import DataError
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.data.files import AnyPath

#: The third byte of a file, and what it stands for; numbers are big-endian.
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"


@refuses
def mnist(folder: AnyPath) -> tuple[ImageDataset, ImageDataset]:
    """Return MNIST as (train, test): x (n, 1, 28, 28) float32 in 0 to 1, y (n,) int64.

    `folder` holds the four files of LeCun, Cortes and Burges, train-images-idx3-ubyte and so on, or
    those of a set made like it (Fashion-MNIST, KMNIST; then height and width are theirs); each may
    end in .gz. Raises DataError for a file that is missing, cut short or of another kind, and where
    there are not as many labels as images.
    """
    return _part(Path(folder), "train"), _part(Path(folder), "t10k")


@refuses
def read_idx(path: AnyPath) -> Array:
    """Return the array in an IDX file, plain or gzip, in its own dtype and native byte order.

    The format is described with the MNIST files: two zero bytes, the dtype, the number of
    dimensions, each dimension as a big-endian uint32, the numbers in C order. Raises DataError for
    a file that is missing, or not exactly that.
    """
    path = Path(path)
    with reading(path, "an IDX file"):
        content = path.read_bytes()
    if content.startswith(GZIP_MAGIC):
        content = _unpacked(content, path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in DTYPES:
        codes = ", ".join(f"{code:02x}" for code in DTYPES)
        raise DataError(
            f"{path} begins with {content[:4].hex(' ') or 'nothing'}; "
            f"expected the bytes of an IDX file: 00 00, one of {codes}, the number of dimensions"
        )
    data = 4 + 4 * content[3]
    if len(content) < data:
        raise DataError(f"{path} is cut short: {len(content)} bytes; expected {data} of header")
    shape = struct.unpack(f">{content[3]}I", content[4:data])
    dtype = np.dtype(DTYPES[content[2]])
    expected = data + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(
            f"{path} holds {len(content)} bytes; "
            f"expected {expected}, as its header says {shape} {dtype.name}"
        )
    return np.frombuffer(content, dtype, offset=data).reshape(shape).astype(dtype.newbyteorder("="))


def _unpacked(content: bytes, path: Path) -> bytes:
    import gzip
    import zlib

    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: {error}; expected a whole gzip file") from error


def _part(folder: Path, part: str) -> ImageDataset:
    images, labels = (_find(folder, part, kind) for kind in ("images-idx3", "labels-idx1"))
    x, y = read_idx(images), read_idx(labels)
    for path, array, dimensions in ((images, x, 3), (labels, y, 1)):
        if array.dtype != np.uint8 or array.ndim != dimensions:
            raise DataError(
                f"{path} holds {array.dtype} of shape {array.shape}; "
                f"expected uint8 of {dimensions} dimension{'s' * (dimensions > 1)}"
            )
    if len(x) != len(y):
        raise DataError(f"{labels} holds {len(y)} labels; expected {len(x)}, one for each image")
    return ImageDataset(ArrayDataset(x[:, None], y.astype(np.int64)))


def _find(folder: Path, part: str, kind: str) -> Path:
    dash = f"{part}-{kind}-ubyte"
    dot = f"{part}-{kind.replace('-', '.')}-ubyte"  # as some archives name them
    with reading(folder, "the folder of the four MNIST files"):
        there = {path.name for path in folder.iterdir()}
    for name in (dash, f"{dash}.gz", dot, f"{dot}.gz"):
        if name in there:
            return folder / name
    raise DataError(f"{folder} has no {dash}, and no {dash}.gz; it has {listed(there)}")
