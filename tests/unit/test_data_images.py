"""IDX and CIFAR-10 files, and images as uint8."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from mpidl import data
from mpidl.errors import DataError, InvalidArgument
from tests.unit.test_data_files import check_take, random_array

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    """Return what an IDX file of `array` holds."""
    header = struct.pack(">BBBB", 0, 0, CODES[array.dtype.str[1:]], array.ndim)
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return header + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def random_mnist(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(256, size=(n, 7, 5)).astype("u1"), rng.integers(10, size=n).astype("u1")


def write_mnist(folder: Path, rng: np.random.Generator, names: str, packed: bool) -> list:
    """Write train and test part; return images and labels of both."""
    parts = [random_mnist(rng, n) for n in (int(rng.integers(5, 40)), int(rng.integers(1, 5)))]
    for part, (x, y) in zip(("train", "t10k"), parts, strict=True):
        for kind, array in (("images", x), ("labels", y)):
            content = idx_bytes(array)
            name = names.format(part=part, kind=kind, d=array.ndim)
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return parts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2, 2), (0, 4), ()])
@pytest.mark.parametrize("dtype", CODES)
def test_idx(
    dtype: str, shape: tuple[int, ...], packed: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    array = np.asarray(random_array(rng, shape, dtype))
    content = idx_bytes(array)
    (tmp_path / "a").write_bytes(gzip.compress(content) if packed else content)
    found = data.read_idx(tmp_path / "a")
    np.testing.assert_array_equal(found, array, strict=True)
    assert found.dtype.isnative
    assert found.flags.writeable


@pytest.mark.parametrize(
    ("names", "packed"),
    [
        ("{part}-{kind}-idx{d}-ubyte", False),
        ("{part}-{kind}-idx{d}-ubyte.gz", True),
        ("{part}-{kind}.idx{d}-ubyte", False),
        ("{part}-{kind}.idx{d}-ubyte.gz", True),
        ("{part}-{kind}-idx{d}-ubyte.gz", False),  # unpacked on the way, and not renamed
    ],
)
def test_mnist(names: str, packed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    parts = write_mnist(tmp_path, rng, names, packed)
    for made, (x, y) in zip(data.mnist(tmp_path), parts, strict=True):
        expected = (x[:, None] / 255).astype(np.float32)
        check_take(made, expected, y.astype(np.int64), rng)


def records(rng: np.random.Generator, n: int) -> np.ndarray:
    made = rng.integers(256, size=(n, 3073)).astype(np.uint8)
    made[:, 0] %= 10
    return made


def write_cifar(folder: Path, rng: np.random.Generator) -> list[np.ndarray]:
    """Write the six files; return the records of both parts."""
    files = [records(rng, int(rng.integers(1, 5))) for _ in range(6)]
    for i, made in enumerate(files[:5], 1):
        made.tofile(folder / f"data_batch_{i}.bin")
    files[5].tofile(folder / "test_batch.bin")
    return [np.concatenate(files[:5]), files[5]]


def test_cifar10(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = write_cifar(tmp_path, rng)
    for made, both in zip(data.cifar10(tmp_path), parts, strict=True):
        planes = [both[:, 1 + 1024 * c : 1025 + 1024 * c].reshape(-1, 32, 32) for c in range(3)]
        x = (np.stack(planes, axis=1) / 255).astype(np.float32)
        check_take(made, x, both[:, 0].astype(np.int64), rng)


def test_images_are_kept_as_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    write_cifar(tmp_path, rng)
    write_mnist(tmp_path, rng, "{part}-{kind}-idx{d}-ubyte", packed=False)
    for made in (*data.cifar10(tmp_path), *data.mnist(tmp_path)):
        assert isinstance(made.images, data.ArrayDataset)
        assert made.images.x.dtype == np.uint8


def test_images_of_any_data_set(rng: np.random.Generator) -> None:
    x, y = rng.integers(256, size=(9, 2, 2)).astype(np.uint8), rng.integers(9, size=9)
    x[0, 0] = [0, 255]
    made = data.ImageDataset(data.ArrayDataset(x, y))
    check_take(made, (x / 255).astype(np.float32), y, rng)
    np.testing.assert_array_equal(made.take(np.arange(1))[0][0, 0], [0, 1])
    with pytest.raises(InvalidArgument, match="images of dtype float64: expected uint8"):
        data.ImageDataset(data.ArrayDataset(x / 255, y)).take(np.arange(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a begins with nothing; expected the bytes of an IDX file"),
        (b"\0\0\x08", r"a begins with 00 00 08; expected"),
        (b"\0\0\x07\x01\0\0\0\0", r"begins with 00 00 07 01; expected .* 00 00, one of 08, 09, 0b"),
        (b"\x01\0\x08\x01\0\0\0\0", r"begins with 01 00 08 01; expected"),
        (b"\0\0\x08\x02\0\0\0\1\0", r"a is cut short: 9 bytes; expected 12 of header"),
        (b"\0\0\x0c\x01\0\0\0\x02" + b"\0" * 7, r"holds 15 bytes; expected 16, .* \(2,\) int32"),
        (b"\0\0\x0c\x01\0\0\0\x02" + b"\0" * 9, r"holds 17 bytes; expected 16, .* \(2,\) int32"),
        (b"\0\0\x0e\x03" + b"\xff" * 12, r"holds 16 bytes; expected 633825299\d+,"),
        (
            gzip.compress(b"\0\0\x08\x01\0\0\0\5 ab"),
            r"holds 11 bytes; expected 13, ",
        ),
        (b"\x1f\x8b", r"a: .*; expected a whole gzip file"),
        (None, r"a: No such file or directory; expected an IDX file"),
    ],
)
def test_idx_that_cannot_be(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_idx(tmp_path / "a")


def test_gzip_cut_or_damaged(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = gzip.compress(idx_bytes(rng.integers(256, size=(9, 9)).astype(np.uint8)))
    damaged = bytearray(whole)
    damaged[-6] ^= 0xFF  # the checksum
    for content in (whole[: int(rng.integers(2, len(whole)))], whole[:-1], damaged):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.gz: .*; expected a whole gzip file"):
            data.read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-labels-idx1", "labels", r"t10k-labels.* holds 70 labels; expected [1-4], one for"),
        ("train-images-idx3", "labels", r"train-images.* holds uint8 of shape \(70,\); expected u"),
        ("train-labels-idx1", "images", r"train-labels.* shape \(2, 3, 3\); expected uint8 of 1 d"),
        ("train-images-idx3", "floats", r"train-images.* holds float32 of shape \(2, 3, 3\); exp"),
        ("train-images-idx3", None, r"no train-images-idx3-ubyte, and no .*\.gz; it has t10k-im"),
    ],
)
def test_mnist_that_cannot_be(
    name: str, array: str | None, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    write_mnist(tmp_path, rng, "{part}-{kind}-idx{d}-ubyte", packed=False)
    arrays = {
        "labels": np.zeros(70, "u1"),
        "images": np.zeros((2, 3, 3), "u1"),
        "floats": np.zeros((2, 3, 3), "f4"),
    }
    if array is None:
        (tmp_path / f"{name}-ubyte").unlink()
    else:
        (tmp_path / f"{name}-ubyte").write_bytes(idx_bytes(arrays[array]))
    with pytest.raises(DataError, match=message):
        data.mnist(tmp_path)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: No such file or directory; expected the folder of"):
        data.mnist(tmp_path / "none")


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_5.bin", "test_batch.bin"])
def test_cifar10_that_cannot_be(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    write_cifar(tmp_path, rng)
    for size in (0, 3072, 3074 * 2):
        (tmp_path / name).write_bytes(bytes(size))
        message = f"{name} holds {size} bytes; expected a multiple of 3073, above 0"
        with pytest.raises(DataError, match=message):
            data.cifar10(tmp_path)
    wrong = records(rng, 4)
    wrong[2, 0] = 10
    wrong.tofile(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: image 2 has label 10; expected 0 to 9"):
        data.cifar10(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: No such file or directory; expected a file of"):
        data.cifar10(tmp_path)
