"""What a data set is: a length, and samples by their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpidl.array import is_array, is_device, namespace
from mpidl.errors import InvalidArgument
from mpidl.refuse import refuses, told

if TYPE_CHECKING:
    from mpidl.array import Array


class Dataset(Protocol):
    """Anything with a length and `take`."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return inputs (n, ...) and targets (n, ...) of the samples `indices` (n,); n may be 0."""


@dataclass(frozen=True)
class ArrayDataset:
    """Inputs x (n, ...) and targets y (n, ...), both in memory."""

    x: Array
    y: Array

    def __post_init__(self) -> None:
        for name, values in (("x", self.x), ("y", self.y)):
            if not is_array(values) or values.ndim == 0:
                raise InvalidArgument(
                    f"ArrayDataset: {name} is {told(values)}: expected an array of one row a sample"
                )
        if len(self.x) != len(self.y):
            raise InvalidArgument(f"ArrayDataset: {len(self.x)} inputs, but {len(self.y)} targets")

    def __len__(self) -> int:
        return len(self.x)

    @refuses
    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return copies of the samples `indices` (n,). Raises InvalidArgument for other numbers."""
        if is_device(self.x) and is_device(self.y):
            indices = namespace(self.x).asarray(indices)  # one copy there, for both
        return self.x[indices], self.y[indices]


@dataclass(frozen=True)
class ImageDataset:
    """The samples of a data set of images, uint8 where they are kept, float32 in 0 to 1 as taken.

    So they need a quarter of the memory: `ImageDataset(npy("x.npy", "y.npy"))`.
    """

    images: Dataset

    def __post_init__(self) -> None:
        length(self.images, "ImageDataset")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return the samples `indices` (n,). Raises InvalidArgument where inputs are not uint8."""
        x, y = self.images.take(indices)
        if x.dtype != np.uint8:
            raise InvalidArgument(f"ImageDataset: images of dtype {x.dtype}: expected uint8")
        return namespace(x).divide(x, 255, dtype=np.float32), y


def length(dataset: Any, who: str) -> int:
    """Return the number of samples. Raises InvalidArgument for what is no data set.

    An array is none, though it has a length and a method `take`.
    """
    if is_array(dataset) or not hasattr(dataset, "take") or not hasattr(dataset, "__len__"):
        raise InvalidArgument(
            f"{who}: expected a data set, such as data.ArrayDataset(x, y), found {told(dataset)}"
        )
    return len(dataset)


@refuses
def numbers_of(indices: Array, n: int) -> Array:
    """Return `indices` (k,) as intp, for data sets that do not index a NumPy array with them.

    Raises InvalidArgument where they are not integers from 0 to n - 1.
    """
    numbers = np.asarray(indices)
    if numbers.ndim != 1:
        raise InvalidArgument(f"take: indices of shape {numbers.shape}: expected (k,)")
    if numbers.size == 0:
        return numbers.astype(np.intp)
    if numbers.dtype.kind not in "iu":
        raise InvalidArgument(f"take: indices of dtype {numbers.dtype}: expected integers")
    low, high = numbers.min(), numbers.max()
    if low < 0 or high >= n:
        raise InvalidArgument(
            f"take: sample {low if low < 0 else high}: expected 0 to {n - 1}, of {n} samples"
        )
    return numbers.astype(np.intp)
