"""Data sets in .npy and .npz files; and, for all readers, what `take` must do."""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mpidl import data
from mpidl.data.files import MappedRows
from mpidl.errors import DataError

DTYPES = ["u1", "i2", "<f4", ">f4", "f8", "f2", ">i8", "?", "c16"]


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (rng.normal(size=shape) * 50 + 100).astype(dtype)


def check_take(
    dataset: data.Dataset, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> None:
    """Assert that `dataset`, and its pickled copy, holds the samples x, y, and gives copies."""
    n = len(x)
    picks = [np.arange(n), rng.permutation(n), np.arange(0)]
    if n:
        picks += [rng.integers(n, size=3 * n), np.array([n - 1, 0]), [int(rng.integers(n))]]
    for made in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert len(made) == n
        for indices in picks * 2:  # what is done to the first results must not show in the second
            for found, whole in zip(made.take(indices), (x, y), strict=True):
                np.testing.assert_array_equal(found, whole[np.asarray(indices, int)], strict=True)
                assert found.dtype.isnative
                assert found.flags.c_contiguous
                found[...] = 0


def save(folder: Path, x: np.ndarray, y: np.ndarray) -> data.FileDataset:
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return data.npy(folder / "x.npy", str(folder / "y.npy"))


def native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="))


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 2, 3, 2), (0, 3), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_npy(dtype: str, shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = random_array(rng, shape, dtype), rng.integers(-9, 9, shape[0])
    check_take(save(tmp_path, x, y), native(x), y, rng)


def test_npy_in_the_order_of_fortran(tmp_path: Path, rng: np.random.Generator) -> None:
    x = np.asfortranarray(rng.normal(size=(6, 4, 3)))
    check_take(save(tmp_path, x, x[:, 0]), x, x[:, 0], rng)


def test_npy_with_a_header_of_version_2(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 4)), rng.integers(9, size=6)
    made = save(tmp_path, x, y)
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, x, version=(2, 0))
    check_take(data.npy(tmp_path / "x.npy", tmp_path / "y.npy"), x, y, rng)
    assert len(made) == 6


def test_npy_found_from_another_folder(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker process may have another working directory."""
    x, y = rng.normal(size=(6, 4)), rng.integers(9, size=6)
    save(tmp_path, x, y)
    monkeypatch.chdir(tmp_path)
    made = data.npy("x.npy", "y.npy")
    monkeypatch.chdir("/")
    check_take(made, x, y, rng)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_npz(dtype: str, compressed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    for shape in ((7,), (5, 3, 2), (0, 3)):
        x = random_array(rng, shape, dtype)
        # names of any length, so that arrays begin at any byte
        names = ["a" * int(rng.integers(1, 20)), "b" * int(rng.integers(1, 20))]
        arrays = {names[0]: x, "other": rng.normal(size=3), names[1]: np.asfortranarray(x)}
        (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", **arrays)
        made = data.npz(tmp_path / "d.npz", *names)
        assert isinstance(made.x, np.ndarray if compressed else MappedRows)
        check_take(made, native(x), native(x), rng)


def test_npz_by_its_default_names(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 4)), rng.integers(9, size=6)
    np.savez(tmp_path / "d.npz", y=y, x=x)
    check_take(data.npz(tmp_path / "d.npz"), x, y, rng)


def test_pickles_are_small(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also after the files were mapped: worker processes get the place, not the content."""
    x = rng.normal(size=(1000, 20))
    made = save(tmp_path, x, x)
    made.take(np.arange(5))
    assert len(pickle.dumps(made)) < 2000


STREAM = """
import pickle, resource, sys
import numpy as np
from pathlib import Path
from mpidl import data

used = 1024 * int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + {budget}, used + {budget}))
try:
    np.zeros({nbytes}, np.uint8)
except MemoryError:
    pass
else:
    sys.exit("the limit has no effect")
folder = Path(sys.argv[1])
reader = {{
    "npy": lambda: data.npy(folder / "x.npy", folder / "x.npy"),
    "npz": lambda: data.npz(folder / "d.npz", "x", "x"),
    "hdf5": lambda: data.hdf5(folder / "d.h5", "x", "x"),
}}[sys.argv[2]]
dataset = data.StandardScaler.fit(reader(), world=None).apply(reader())
largest = [float(x.max()) for x, _ in data.batches(dataset, 1000, world=None)]
print(len(dataset), max(largest))
"""


@pytest.mark.parametrize("kind", ["npy", "npz", "hdf5"])
def test_data_larger_than_memory(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Fit a scaler to 192 MiB and read them all, shuffled, with 64 MiB to spare."""
    import h5py

    shape = n, features = 48 * 1024, 1024
    row, value = int(rng.integers(n)), float(rng.uniform(1, 9))
    if kind == "hdf5":
        with h5py.File(tmp_path / "d.h5", "w") as file:
            file.create_dataset("x", shape, "f4")[row, :] = value
    else:
        x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)  # all holes
        x[row] = value
        x.flush()
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.write(tmp_path / "x.npy", "x.npy")
    script = STREAM.format(budget=64 << 20, nbytes=4 * n * features)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    for file in tmp_path.iterdir():
        file.unlink()
    assert result.returncode == 0, result.stderr
    count, largest = result.stdout.split()
    assert int(count) == n
    # one value v among zeros: mean v/n, variance v^2 (n-1)/n^2
    assert float(largest) == pytest.approx((n - 1) ** 0.5, rel=1e-6)


def npy_bytes(array: np.ndarray, path: Path) -> bytes:
    np.save(path, array)
    return path.read_bytes()


def test_npy_cut_anywhere(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 3))
    whole = npy_bytes(x, tmp_path / "y.npy")
    for length in (0, 3, 9, 50, 127, 128, len(whole) - 1, int(rng.integers(len(whole)))):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.npy.*expected"):
            data.npy(tmp_path / "x.npy", tmp_path / "y.npy")
    (tmp_path / "x.npy").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"x.npy is cut short: 119 bytes of data; expected 120"):
        data.npy(tmp_path / "x.npy", tmp_path / "y.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.float32(3), r"x.npy is a single number; expected an array of one row per sample"),
        (np.array(["a"] * 4), r"x.npy has dtype <U1; expected numbers"),
        (np.zeros(4, [("é☃", "f4")]), "x.npy.*expected"),
        (np.zeros((3, 2)), r"y.npy has 4 rows; expected 3, as .*x.npy has"),
        (b"P3 4 5 6 7 8", r"x.npy: the magic string is not correct.*; expected an array as"),
        (None, r"x.npy: No such file or directory; expected a \.npy file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_npy_that_cannot_be(content: object, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.zeros(4))
    if isinstance(content, bytes):
        (tmp_path / "x.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "x.npy", content)
    with pytest.raises(DataError, match=message):
        data.npy(tmp_path / "x.npy", tmp_path / "y.npy")


def test_damaged_headers(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever stands in them, the error is a DataError."""
    path = tmp_path / "x.npy"
    whole = npy_bytes(np.zeros((5, 3)), path)
    for at in rng.integers(8, 60, 100):
        path.write_bytes(whole[:at] + bytes([rng.integers(256)]) + whole[at + 1 :])
        with contextlib.suppress(DataError):
            data.npy(path, path)
    path.write_bytes(whole.replace(b"}", b" "))
    with pytest.raises(DataError, match=r"x.npy: .*; expected an array as numpy.save writes it"):
        data.npy(path, path)


def test_objects_are_not_loaded(tmp_path: Path) -> None:
    """They would be unpickled, which runs what the file's author likes."""
    np.save(tmp_path / "x.npy", np.array([{}, []], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x.npy has dtype object; expected numbers"):
        data.npy(tmp_path / "x.npy", tmp_path / "x.npy")


def test_npy_that_is_gone_when_first_read(tmp_path: Path) -> None:
    made = save(tmp_path, np.zeros(3), np.zeros(3))
    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match=r"x.npy: No such file"):
        made.take(np.arange(1))


def test_npz_that_cannot_be(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "d.npz"
    with pytest.raises(DataError, match=r"d.npz: No such file or directory; expected a \.npz file"):
        data.npz(path)
    for compress in (np.savez, np.savez_compressed):
        compress(path, inputs=rng.normal(size=(50, 3)), y=np.zeros(50), few=np.zeros(49))
        with pytest.raises(DataError, match=r"no array 'x'; it has few, inputs, y$"):
            data.npz(path)
        with pytest.raises(
            DataError, match=r"d.npz: 'few' has 49 rows; expected 50, as .*d.npz: 'inputs' has"
        ):
            data.npz(path, "inputs", "few")
        whole = path.read_bytes()
        path.write_bytes(whole[: -int(rng.integers(1, len(whole)))])
        with pytest.raises(DataError, match=r"d.npz: .* expected a whole \.npz file"):
            data.npz(path, "inputs", "y")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("method", r"d.npz: 'x': .*invalid block type; expected a whole compressed array"),
        ("checksum", r"d.npz: Bad CRC-32 .*; expected a whole \.npz file"),
        ("encrypted", r"d.npz: 'x': .* is encrypted, .*; expected a whole compressed array"),
    ],
)
def test_npz_whose_compressed_content_is_damaged(
    damage: str, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=rng.normal(size=(50, 3)), y=np.zeros(50))
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\1\2")
    if damage == "method":
        content[30 + sum(struct.unpack("<HH", content[26:30]))] = 0xFF
    elif damage == "checksum":
        content[central + 16] ^= 0xFF
    else:
        content[6] |= 1
        content[central + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.npz(path)


def test_npz_whose_member_is_cut(tmp_path: Path, rng: np.random.Generator) -> None:
    """The array's own header promises more than the zip holds."""
    whole = npy_bytes(rng.normal(size=(5, 3)), tmp_path / "x.npy")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as archive:
            archive.writestr("x.npy", whole[:-8])
        message = re.escape("'x' is cut short: 112 bytes of data; expected 120, for (5, 3) float64")
        with pytest.raises(DataError, match=message):
            data.npz(tmp_path / "d.npz", "x", "x")
