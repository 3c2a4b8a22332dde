"""What a data set is: a length, and samples by their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpidl.errors import InvalidArgument

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
        if len(self.x) != len(self.y):
            raise InvalidArgument(f"ArrayDataset: {len(self.x)} inputs, but {len(self.y)} targets")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return copies of the samples `indices` (n,)."""
        return self.x[indices], self.y[indices]
