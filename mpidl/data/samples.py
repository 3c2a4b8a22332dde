"""Small real data sets that come inside Python wheels: nothing is downloaded at run time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.data.dataset import ArrayDataset
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import refuses, whole

if TYPE_CHECKING:
    from mpidl.array import Array

#: Of each set: files of inputs and targets, or of both with the target last; and how to read them.
FILES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "breast_cancer": (("breast_cancer.csv",), {"delimiter": ",", "skiprows": 1}),
    "diabetes": (("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"), {}),
    "digits": (("digits.csv.gz",), {"delimiter": ","}),
    "wine": (("wine_data.csv",), {"delimiter": ",", "skiprows": 1}),
}


def digits(test_share: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 1,797 handwritten digits as (train, test): x (n, 64) float32 in 0 to 1, y (n,) int64.

    The 8x8 pictures are the test part of the UCI set of Alpaydin and Kaynak (1998), from
    scikit-learn. The same `seed` gives the same split on every rank and machine.
    """
    x, y = _load("digits", test_share)
    return _split(x / 16, y.astype(np.int64), test_share, seed)


def breast_cancer(test_share: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 569 tumours as (train, test): x (n, 30) float32, y (n,) int64, 1 where benign.

    The Wisconsin diagnostic set of Street, Wolberg and Mangasarian (1993), from scikit-learn.
    Features differ in size by a factor of 10,000: see `StandardScaler`. `seed` as for `digits`.
    """
    x, y = _load("breast_cancer", test_share)
    return _split(x, y.astype(np.int64), test_share, seed)


def diabetes(test_share: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 442 patients as (train, test): x (n, 10) and y (n, 1), both float32.

    y is the progress of the disease in a year, 25 to 346. The set of Efron, Hastie, Johnstone and
    Tibshirani (2004), from scikit-learn, as measured: its scaled version was fitted on the test
    part, too; see `StandardScaler`. `seed` as for `digits`.
    """
    x, y = _load("diabetes", test_share)
    return _split(x, y[:, None].astype(np.float32), test_share, seed)


def wine(test_share: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 178 wines as (train, test): x (n, 13) float32, y (n,) int64, the 3 cultivars.

    The UCI set of Aeberhard and Forina (1992), from scikit-learn. Features differ in size by a
    factor of 1,000: see `StandardScaler`. `seed` as for `digits`.
    """
    x, y = _load("wine", test_share)
    return _split(x, y.astype(np.int64), test_share, seed)


@refuses
def check_share(name: str, test_share: float) -> None:
    """Raise InvalidArgument where `test_share` leaves nothing to train or nothing to test on."""
    if not 0 < test_share < 1:
        raise InvalidArgument(f"{name}: test_share={test_share}: expected more than 0, less than 1")


def _load(name: str, test_share: float) -> tuple[Array, Array]:
    """Return inputs and targets as scikit-learn's `load_...(return_X_y=True)` does, unscaled.

    They are read from its files: to import it takes two seconds on each rank.
    """
    check_share(name, test_share)
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise MpidlError(f"data.{name} needs scikit-learn: pip install 'mpidl[examples]'")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    files, options = FILES[name]
    try:
        parts = [np.loadtxt(folder / file, **options) for file in files]
    except FileNotFoundError as error:
        raise MpidlError(f"data.{name}: this scikit-learn lacks a file: {error}") from error
    if len(parts) == 1:
        return parts[0][:, :-1], parts[0][:, -1]
    return parts[0], parts[1]


def _split(x: Array, y: Array, test_share: float, seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    order = np.random.default_rng(whole("seed", seed)).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    cut = round(len(x) * test_share)
    return ArrayDataset(x[cut:], y[cut:]), ArrayDataset(x[:cut], y[:cut])
