"""Features brought to one size, as the training data of all ranks together have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl.array import as_array, is_array, namespace, to_numpy
from mpidl.data.dataset import length
from mpidl.errors import InvalidArgument
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from mpidl.array import Array
    from mpidl.data.dataset import Dataset
    from mpidl.world import World

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Scaler(ABC):
    """Takes `offset` from each feature, and divides it by `scale`.

    Both are NumPy arrays (...) float64, of the shape of one sample; `scale` is 1 for a feature that
    is the same in all samples, which so becomes 0. Save these two, or pickle the whole.
    """

    offset: Array
    scale: Array

    def __post_init__(self) -> None:
        for name in ("offset", "scale"):
            values = getattr(self, name)
            if not is_array(values) or values.dtype.kind not in "biuf":
                raise InvalidArgument(f"{type(self).__name__}: {name} is no array of numbers")
        if self.offset.shape != self.scale.shape:
            shapes = f"{self.offset.shape} and {self.scale.shape}"
            raise InvalidArgument(f"{type(self).__name__}: shapes {shapes}: expected the same")

    @classmethod
    @abstractmethod
    def fit(cls, dataset: Dataset, *, world: World | None) -> Scaler:
        """Return the scaler for the inputs of `dataset`, the same on every rank. Collective.

        Without a `world` (None) it is not. Each rank reads its contiguous share of the samples,
        once and a few at a time, and all but the last sums are its own. Raises on every rank:
        InvalidArgument for a data set that is empty, or holds NaN, infinity or no real numbers (it
        names the feature); RankMismatch where the ranks' data sets differ in length or shape.
        """

    def __call__(self, x: Array) -> Array:
        """Return x (n, ...) scaled, in its own floating dtype; integers become float32.

        Raises InvalidArgument where the features have another shape than those of `fit`.
        """
        offset, scale = self._like(x)
        return ((as_array(x) - offset) / scale).astype(_floating(x), copy=False)

    def inverse(self, x: Array) -> Array:
        """Return what was scaled to x (n, ...), in the dtype of x. Raises as the call does."""
        offset, scale = self._like(x)
        return (as_array(x) * scale + offset).astype(_floating(x), copy=False)

    def apply(self, dataset: Dataset) -> ScaledDataset:
        """Return `dataset` with its inputs scaled as they are taken; use it for train and test."""
        length(dataset, f"{type(self).__name__}.apply")
        return ScaledDataset(dataset, self)

    def _like(self, x: Array) -> tuple[Array, Array]:
        if not is_array(x) or x.dtype.kind not in "biuf":
            raise InvalidArgument(f"{type(self).__name__}: expected numbers, found {told(x)}")
        if x.ndim == 0 or x.shape[1:] != self.offset.shape:
            raise InvalidArgument(
                f"{type(self).__name__}: features of shape {x.shape[1:]}: "
                f"expected {self.offset.shape}, as in the data of fit"
            )
        xp = namespace(x)
        return xp.asarray(self.offset), xp.asarray(self.scale)


@dataclass(frozen=True)
class ScaledDataset:
    """The samples of a data set, their inputs scaled. Made by `Scaler.apply`."""

    dataset: Dataset
    scaler: Scaler

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return the samples `indices` (n,), inputs scaled, targets as they are."""
        x, y = self.dataset.take(indices)
        return self.scaler(x), y


@final
class StandardScaler(Scaler):
    """Scales each feature to a mean of 0 and a standard deviation of 1 (that of the samples, /n).

    Moments of chunks are merged by the formula of Chan, Golub and LeVeque (1983, equation 2.1), of
    ranks by that for many parts at once; so they are as exact as a second pass would make them.
    """

    @classmethod
    def fit(cls, dataset: Dataset, *, world: World | None) -> StandardScaler:
        """Return the scaler for `dataset`, as `Scaler.fit` says. Collective."""
        first = _first_sample(cls.__name__, dataset, world)
        with _together(world):
            count, mean, squares = _moments(_chunks(cls.__name__, dataset, world), first)
        total = _sum(world, count * mean) / len(dataset)
        squares = _sum(world, squares + count * (mean - total) ** 2)
        scale = np.sqrt(squares / len(dataset))
        return cls(np.asarray(first + total), np.where(scale > 0, scale, 1))


@final
class MinMaxScaler(Scaler):
    """Scales each feature to 0 at its least value in the data of `fit`, and 1 at its greatest.

    Other data may go beyond.
    """

    @classmethod
    def fit(cls, dataset: Dataset, *, world: World | None) -> MinMaxScaler:
        """Return the scaler for `dataset`, as `Scaler.fit` says. Collective."""
        low = _first_sample(cls.__name__, dataset, world)
        high = low.copy()
        with _together(world):
            for x in _chunks(cls.__name__, dataset, world):
                np.minimum(low, to_numpy(x.min(axis=0)), out=low)
                np.maximum(high, to_numpy(x.max(axis=0)), out=high)
        if world is not None:
            with world.mark.enter("least and greatest of {} features", (low.size,)):
                world.comm.Allreduce(world.MPI.IN_PLACE, low, world.MPI.MIN)
                world.comm.Allreduce(world.MPI.IN_PLACE, high, world.MPI.MAX)
        return cls(low, np.where(high > low, high - low, 1))


def _moments(chunks: Iterator[Array], shift: Array) -> tuple[int, Array, Array]:
    """Return the number of samples, mean and sum of squared deviations (...) of x - shift.

    With the same sample as `shift` everywhere, what is constant comes out as exactly 0.
    """
    count, mean, squares = 0, np.zeros_like(shift), np.zeros_like(shift)
    for x in chunks:
        n, total = len(x), count + len(x)
        x = x - namespace(x).asarray(shift)
        own = x.mean(axis=0)
        own_squares = to_numpy(((x - own) ** 2).sum(axis=0))
        delta = to_numpy(own) - mean
        mean = mean + delta * (n / total)
        squares = squares + own_squares + delta**2 * (count * n / total)
        count = total
    return count, mean, squares


def _first_sample(name: str, dataset: Dataset, world: World | None) -> Array:
    """Return the inputs (...) of sample 0, as rank 0 has it; makes sure that the ranks fit."""
    with _together(world):
        if length(dataset, f"{name}.fit") == 0:
            raise InvalidArgument(f"{name}.fit: the data set is empty: expected samples")
        first = to_numpy(_read(name, dataset, 0, 1)[0])
    if world is None:
        return first
    world.same(f"{len(dataset)} samples of shape {first.shape}", f"{name}.fit")
    return world.broadcast(first)


def _chunks(name: str, dataset: Dataset, world: World | None) -> Iterator[Array]:
    """Yield the inputs of this rank's share of the samples, as float64, some rows at a time."""
    n = len(dataset)
    rank, size = (world.rank, world.size) if world else (0, 1)
    start, stop = n * rank // size, n * (rank + 1) // size
    rows = 1
    while start < stop:
        x = _read(name, dataset, start, min(start + rows, stop))
        yield x
        start += len(x)
        rows = max(1, CHUNK_BYTES // max(1, x[0].nbytes))


def _read(name: str, dataset: Dataset, start: int, stop: int) -> Array:
    x, _ = dataset.take(np.arange(start, stop))
    if x.dtype.kind not in "biuf":
        raise InvalidArgument(f"{name}.fit: inputs of dtype {x.dtype}: expected real numbers")
    finite = namespace(x).isfinite(x)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~to_numpy(finite))[0])
        feature = f"feature {', '.join(map(str, at[1:]))} of " if at[1:] else ""
        raise InvalidArgument(
            f"{name}.fit: {feature}sample {start + at[0]} is {float(x[at])}: "
            "expected finite numbers; leave such samples out, or fill them in"
        )
    return x.astype(np.float64, order="C")  # MPI adds up arrays as they lie in memory


def _sum(world: World | None, values: Array) -> Array:
    return values if world is None else world.sum(values)


def _together(world: World | None) -> AbstractContextManager[None]:
    return nullcontext() if world is None else world.together()


def _floating(x: Array) -> np.dtype[Any]:
    return x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
