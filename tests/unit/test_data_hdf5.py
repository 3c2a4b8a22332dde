"""Data sets in HDF5 files."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpidl import data
from mpidl.errors import DataError, InvalidArgument, MpidlError
from tests.unit.test_data_files import check_take, native, random_array

LAYOUTS = [{}, {"chunks": True}, {"chunks": True, "compression": "gzip", "shuffle": True}]


@pytest.fixture(params=[0, 40, 1 << 14])
def gap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How far apart rows may lie to be read in one go."""
    monkeypatch.setattr(sys.modules["mpidl.data.hdf5"], "GAP_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "f8", ">i8", "?"])
def test_hdf5(dtype: str, layout: dict, gap: int, tmp_path: Path, rng: np.random.Generator) -> None:
    for shape in ((9,), (30, 3), (7, 2, 3, 2)):
        x, y = random_array(rng, shape, dtype), rng.integers(-9, 9, shape[0])
        with h5py.File(tmp_path / "d.h5", "w") as file:
            file.create_dataset("x", data=x, **layout)
            file.create_dataset("y", data=y, **layout)
        check_take(data.hdf5(tmp_path / "d.h5"), native(x), y, rng)


def test_only_the_rows_asked_for_are_read(
    gap: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most `gap` bytes more than that for each."""
    x = rng.normal(size=(1000, 3)).astype(np.float32)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = x
    made = data.hdf5(tmp_path / "d.h5", "x", "x")
    spans: list[slice] = []
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, span: spans.append(span) or read(self, span)
    )
    rows = rng.choice(1000, 200, replace=False)
    np.testing.assert_array_equal(made.x[rows], x[rows])
    assert sum(span.stop - span.start for span in spans) <= 200 * (1 + gap // 12)
    assert spans == sorted(spans, key=lambda span: span.start)
    assert len(spans) == 1 + np.count_nonzero(np.diff(np.sort(rows)) > max(1, gap // 12))
    assert {row for span in spans for row in range(span.start, span.stop)} >= set(rows)


def test_arrays_in_groups(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.normal(size=(6, 2))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["train/inputs"] = x
        file["train/targets"] = x[:, 0]
    check_take(data.hdf5(tmp_path / "d.h5", "train/inputs", "train/targets"), x, x[:, 0], rng)


def test_no_samples(tmp_path: Path, rng: np.random.Generator) -> None:
    x = np.zeros((0, 3), np.float32)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = x
    check_take(data.hdf5(tmp_path / "d.h5", "x", "x"), x, x, rng)


def test_each_process_opens_the_file_for_itself(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.normal(size=(6, 2))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = x
    opened: list[int] = []
    File = h5py.File
    monkeypatch.setattr(h5py, "File", lambda *a, **kw: opened.append(os.getpid()) or File(*a, **kw))
    made = data.hdf5(tmp_path / "d.h5", "x", "x")
    assert len(opened) == 1  # to look at it; and closed again
    for _ in range(3):
        made.take(np.arange(3))
    assert len(opened) == 3  # one for x, one for y
    assert len(pickle.dumps(made)) < 2000
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)  # as after a fork
    np.testing.assert_array_equal(made.take(np.arange(6))[0], x)
    assert opened[3:] == [here + 1] * 2


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], "take: sample 6: expected 0 to 5, of 6 samples"),
        ([2, -1], "take: sample -1: expected 0 to 5, of 6 samples"),
        ([0.5], "take: indices of dtype float64: expected integers"),
        ([True] * 6, "take: indices of dtype bool: expected integers"),
    ],
)
def test_indices_that_cannot_be(indices: list, message: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = np.zeros(6)
    with pytest.raises(InvalidArgument, match=message):
        data.hdf5(tmp_path / "d.h5", "x", "x").take(np.array(indices))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x", "z"), r"d.h5 has no data set 'z'; it has few, one, part/w, words, x$"),
        (("part", "x"), r"d.h5 has no data set 'part'; it has "),
        (("x", "few"), r"d.h5: 'few' has 3 rows; expected 4, as .*d.h5: 'x' has"),
        (("one", "x"), r"d.h5: 'one' is a single number; expected"),
        (("words", "x"), r"d.h5: 'words' has dtype object; expected numbers"),
    ],
)
def test_data_sets_that_cannot_be(names: tuple[str, str], message: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file.update({"x": np.zeros(4), "few": np.zeros(3), "one": 1.5, "part/w": np.zeros(2)})
        file["words"] = ["a", "b", "c", "d"]
    with pytest.raises(DataError, match=message):
        data.hdf5(tmp_path / "d.h5", *names)


def test_files_that_cannot_be(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "d.h5"
    with pytest.raises(DataError, match=r"d.h5: No such file or directory; expected an HDF5 file"):
        data.hdf5(path)
    path.write_bytes(rng.bytes(5000))
    with pytest.raises(DataError, match=r"d.h5: .*; expected an HDF5 file"):
        data.hdf5(path)
    with h5py.File(path, "w") as file:
        file["x"] = rng.normal(size=(500, 3))
    path.write_bytes(path.read_bytes()[: -int(rng.integers(1, 9000))])
    with pytest.raises(DataError, match=r"d.h5: .*truncated.*; expected an HDF5 file"):
        data.hdf5(path)


def test_damaged_files(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever stands in them, the error is a DataError."""
    path = tmp_path / "d.h5"
    with h5py.File(path, "w") as file:
        file["x"] = rng.normal(size=(6, 3))
    whole = path.read_bytes()
    failed = 0
    for at in rng.integers(len(whole), size=200):
        path.write_bytes(whole[:at] + bytes([rng.integers(256)]) + whole[at + 1 :])
        try:
            data.hdf5(path, "x", "x").take(np.arange(6))
        except DataError:
            failed += 1
    assert failed


def test_rows_that_cannot_be_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """A chunk whose checksum is wrong is found when it is read."""
    path = tmp_path / "d.h5"
    x = rng.normal(size=(512, 4))
    with h5py.File(path, "w") as file:
        made = file.create_dataset("x", data=x, chunks=(512, 4), fletcher32=True)
        at = made.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[at + int(rng.integers(x.nbytes))] ^= 0xFF
    path.write_bytes(content)
    dataset = data.hdf5(path, "x", "x")
    with pytest.raises(DataError, match=r"d.h5: .*; expected to read 'x' as when it was opened"):
        dataset.take(np.arange(3))


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MpidlError, match=r"data.hdf5 needs h5py: pip install 'mpidl\[hdf5\]'"):
        data.hdf5(tmp_path / "d.h5")
