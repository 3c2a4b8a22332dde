"""The small real data sets: as scikit-learn has them, split in two."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import datasets

from mpidl import data
from mpidl.data import samples
from mpidl.errors import InvalidArgument, MpidlError

LOADERS = {
    data.digits: datasets.load_digits,
    data.breast_cancer: datasets.load_breast_cancer,
    data.diabetes: lambda **kw: datasets.load_diabetes(scaled=False, **kw),
    data.wine: datasets.load_wine,
}
by_name = pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)


def rows(parts: tuple[data.ArrayDataset, ...], divisor: float = 1) -> np.ndarray:
    """Return inputs and target of all samples, sorted, so that their order does not matter."""
    whole = [np.c_[part.x * np.float32(divisor), part.y.reshape(len(part), 1)] for part in parts]
    return np.array(sorted(np.concatenate(whole).tolist()))


@by_name
def test_both_parts_together_are_the_whole(load: Callable, rng: np.random.Generator) -> None:
    x, y = LOADERS[load](return_X_y=True)
    divisor = 16 if load is data.digits else 1
    parts = load(rng.uniform(0.1, 0.9), seed=int(rng.integers(99)))
    expected = np.c_[x.astype(np.float32), y.astype(float)]
    np.testing.assert_array_equal(rows(parts, divisor), np.array(sorted(expected.tolist())))


@by_name
def test_shapes_and_dtypes(load: Callable) -> None:
    x, _ = LOADERS[load](return_X_y=True)
    regression = load is data.diabetes
    train, test = load()
    assert (len(train), len(test)) == (len(x) - round(len(x) / 5), round(len(x) / 5))
    for part in (train, test):
        assert part.x.shape == (len(part), x.shape[1])
        assert part.x.dtype == np.float32
        assert part.y.shape == ((len(part), 1) if regression else (len(part),))
        assert part.y.dtype == (np.float32 if regression else np.int64)


@by_name
def test_the_seed_decides_the_split(load: Callable) -> None:
    for a, b in zip(load(seed=3), load(seed=3), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
    assert not np.array_equal(load(seed=3)[1].x, load(seed=4)[1].x)


@by_name
@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_shares_that_cannot_be(load: Callable, share: float) -> None:
    message = f"{load.__name__}: test_share={share}: expected more than 0, less than 1"
    with pytest.raises(InvalidArgument, match=message):
        load(share)


def test_scikit_learn_is_not_imported() -> None:
    """It takes seconds, on each rank."""
    code = "import sys; from mpidl import data; data.digits(); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samples.FILES, "wine", (("red.csv",), {}))
    with pytest.raises(MpidlError, match=r"data\.wine: this scikit-learn lacks a file: .*red\.csv"):
        data.wine()


@by_name
def test_without_scikit_learn(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MpidlError, match=rf"data\.{load.__name__} needs scikit-learn: pip install"):
        load()
