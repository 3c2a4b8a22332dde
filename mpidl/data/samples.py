"""Small real data sets that come inside Python wheels: nothing is downloaded at run time."""

from __future__ import annotations

import numpy as np

from mpidl.data.dataset import ArrayDataset
from mpidl.errors import InvalidArgument, MpidlError


def digits(test_share: float = 0.2, seed: int = 0) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 1,797 handwritten digits as (train, test): x (n, 64) float32 in 0 to 1, y (n,) int64.

    The 8x8 pictures are the test part of the UCI set of Alpaydin and Kaynak (1998), from
    scikit-learn. The same `seed` gives the same split on every rank and machine.
    """
    if not 0 < test_share < 1:
        raise InvalidArgument(f"digits: test_share={test_share}: expected more than 0, less than 1")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MpidlError("data.digits needs scikit-learn: pip install 'mpidl[examples]'") from error
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)
    cut = round(len(x) * test_share)
    return ArrayDataset(x[cut:], y[cut:]), ArrayDataset(x[:cut], y[:cut])
