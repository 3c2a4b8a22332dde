"""Valid arguments of data sets, batches and files."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpidl import data
from mpidl.data.text import Vocabulary
from tests.fuzz import files
from tests.fuzz.calls import Given, given, on
from tests.fuzz.tables.engine import array

FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
files.make(FOLDER)


def dataset(n: int = 12) -> data.ArrayDataset:
    return data.ArrayDataset(array(n, 3), np.arange(n) % 3)


def images() -> data.ImageDataset:
    return data.ImageDataset(data.ArrayDataset(np.zeros((5, 1, 2, 2), np.uint8), np.arange(5)))


def scaler() -> data.StandardScaler:
    return data.StandardScaler.fit(dataset(), world=None)


def texts() -> data.TextDataset:
    return data.text(FOLDER / "text.txt", 5)[0]


def loader(*args: Any, **options: Any) -> Given:
    made = given(*args, **options)
    return made._replace(then=lambda loader: loader.close())


def epoch_of() -> Given:
    made = data.Loader(dataset(), 4, world=None, workers=0)
    return replace_close(on(made, 0, device="cpu"), made.close)


def replace_close(made: Given, close: Callable[[], None]) -> Given:
    return made._replace(close=close, then=iter)


INDICES = np.array([0, 2])
TABLE: dict[str, Callable[[], Given]] = {
    "data.batches:batches": lambda: given(
        dataset(), 4, world=None, seed=0, epoch=0, shuffle=True, device="cpu", microbatches=2
    )._replace(then=iter),
    "data.cifar:cifar10": lambda: given(FOLDER / "cifar"),
    "data.dataset:ArrayDataset": lambda: given(array(4, 3), np.arange(4))._replace(
        then=lambda d: d.take(INDICES)
    ),
    "data.dataset:ArrayDataset.take": lambda: on(dataset(), INDICES),
    "data.dataset:ImageDataset": lambda: given(images().images)._replace(
        then=lambda d: d.take(INDICES)
    ),
    "data.dataset:ImageDataset.take": lambda: on(images(), INDICES),
    "data.files:FileDataset.take": lambda: on(
        data.npy(FOLDER / "x.npy", FOLDER / "y.npy"), INDICES
    ),
    "data.files:npy": lambda: given(FOLDER / "x.npy", FOLDER / "y.npy"),
    "data.files:npz": lambda: given(FOLDER / "both.npz", "x", "y"),
    "data.hdf5:hdf5": lambda: given(FOLDER / "both.h5", "x", "y"),
    "data.idx:mnist": lambda: given(FOLDER / "mnist"),
    "data.idx:read_idx": lambda: given(FOLDER / "mnist/t10k-labels-idx1-ubyte"),
    "data.loader:Loader": lambda: loader(
        dataset(), 4, world=None, workers=0, prefetch=2, transform=None, seed=0, shuffle=True,
        device="cpu", microbatches=2,
    ),
    "data.loader:Loader.epoch": epoch_of,
    "data.samples:breast_cancer": lambda: given(0.2, 0),
    "data.samples:diabetes": lambda: given(0.2, 0),
    "data.samples:digits": lambda: given(0.2, 0),
    "data.samples:wine": lambda: given(0.2, 0),
    "data.scale:MinMaxScaler": lambda: given(np.zeros(3), np.ones(3))._replace(
        then=lambda s: s(array(2, 3))
    ),
    "data.scale:MinMaxScaler.fit": lambda: given(dataset(), world=None),
    "data.scale:Scaler.__call__": lambda: on(scaler(), array(2, 3)),
    "data.scale:Scaler.apply": lambda: on(scaler(), dataset()),
    "data.scale:Scaler.inverse": lambda: on(scaler(), array(2, 3)),
    "data.scale:ScaledDataset.take": lambda: on(scaler().apply(dataset()), INDICES),
    "data.scale:StandardScaler": lambda: given(np.zeros(3), np.ones(3))._replace(
        then=lambda s: s(array(2, 3))
    ),
    "data.scale:StandardScaler.fit": lambda: given(dataset(), world=None),
    "data.text:TextDataset.take": lambda: on(texts(), INDICES),
    "data.text:Vocabulary": lambda: given("abc")._replace(then=lambda v: v.encode("ab")),
    "data.text:Vocabulary.decode": lambda: on(Vocabulary("abc"), np.array([0, 2])),
    "data.text:Vocabulary.encode": lambda: on(Vocabulary("abc"), "ab"),
    "data.text:text": lambda: given(FOLDER / "text.txt", 5, stride=2, test_share=0.2),
}  # fmt: skip
