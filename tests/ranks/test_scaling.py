"""A scaler fitted on several ranks is that of one process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.array import is_device, to_numpy
from mpidl.data import ArrayDataset, ImageDataset, MinMaxScaler, Scaler, StandardScaler
from mpidl.errors import DataError, InvalidArgument, RankMismatch

if TYPE_CHECKING:
    from mpidl.world import World

by_kind = pytest.mark.parametrize(
    "kind", [StandardScaler, MinMaxScaler], ids=lambda kind: kind.__name__
)


class Watched:
    """A data set that remembers which samples were taken, and how many at once."""

    def __init__(self, x: Any) -> None:
        self.x, self.taken, self.most = x, [], 0

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: np.ndarray) -> tuple[Any, Any]:
        self.taken += indices.tolist()
        self.most = max(self.most, len(indices))
        return self.x[indices], indices


@pytest.fixture(autouse=True, params=[1, 400, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes are read at once."""
    monkeypatch.setattr(sys.modules["mpidl.data.scale"], "CHUNK_BYTES", request.param)
    return request.param


def reference(kind: type[Scaler], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.longdouble)
    if kind is MinMaxScaler:
        offset, scale = x.min(axis=0), np.ptp(x, axis=0)
    else:
        offset, scale = x.mean(axis=0), x.std(axis=0)
    return offset, np.where((x == x[0]).all(axis=0), 1, scale)


def share(n: int, world: World) -> range:
    return range(n * world.rank // world.size, n * (world.rank + 1) // world.size)


@by_kind
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("n", [1, 2, 3, 50, 1001])
def test_ranks_find_what_one_process_finds(
    kind: type[Scaler],
    n: int,
    shape: tuple[int, ...],
    world: World,
    rng: np.random.Generator,
    xp: Any,
) -> None:
    """With n below the number of ranks, some have no share."""
    x = rng.normal(size=(n, *shape)) * 10.0 ** rng.integers(-3, 4, shape) + 1e5
    train = ArrayDataset(xp.asarray(x), xp.zeros(n))
    made, alone = kind.fit(train, world=world), kind.fit(train, world=None)
    for found, single, exact in zip(
        (made.offset, made.scale), (alone.offset, alone.scale), reference(kind, x), strict=True
    ):
        assert isinstance(found, np.ndarray)
        assert found.shape == shape
        np.testing.assert_allclose(found, single, rtol=1e-10)
        np.testing.assert_allclose(found, exact.astype(float), rtol=1e-10)
    everyone = world.gather((made.offset.tobytes(), made.scale.tobytes()))
    assert len(set(everyone)) == 1, "ranks would train on data that differ"


@by_kind
def test_train_and_test_are_scaled_alike(
    kind: type[Scaler], world: World, rng: np.random.Generator, xp: Any
) -> None:
    x, other = rng.normal(size=(2, 40, 3)).astype(np.float32) * 7 + 3
    y = rng.integers(9, size=40)
    train, test = (ArrayDataset(xp.asarray(part), xp.asarray(y)) for part in (x, other))
    scaler = kind.fit(train, world=world)
    offset, scale = reference(kind, x)
    pick = rng.integers(40, size=11)
    for dataset, whole in ((train, x), (test, other)):
        found, targets = scaler.apply(dataset).take(pick)
        assert is_device(found) == (xp is not np)
        assert found.dtype == np.float32
        exact = ((whole - offset) / scale)[pick].astype(float)
        np.testing.assert_allclose(to_numpy(found), exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(to_numpy(scaler.inverse(found)), whole[pick], atol=1e-5)
        np.testing.assert_array_equal(to_numpy(targets), y[pick])


@by_kind
def test_each_rank_reads_its_share(
    kind: type[Scaler], chunk: int, world: World, rng: np.random.Generator, xp: Any
) -> None:
    """Once, in chunks; and sample 0, which tells the shape."""
    n = int(rng.integers(1, 200))
    watched = Watched(xp.asarray(rng.normal(size=(n, 5))))
    kind.fit(watched, world=world)
    assert watched.taken == [0, *share(n, world)]
    assert watched.most <= max(1, chunk // 40)


@by_kind
def test_constant_features(
    kind: type[Scaler], world: World, rng: np.random.Generator, xp: Any
) -> None:
    """Exactly 0, not a rounding error divided by another."""
    x = rng.normal(size=(301, 3))
    x[:, 1] = rng.uniform(1e3, 1e6) / 3
    made = kind.fit(ArrayDataset(xp.asarray(x), xp.zeros(301)), world=world)
    assert made.scale[1] == 1
    np.testing.assert_array_equal(made(x)[:, 1], 0)


@by_kind
def test_ranks_may_hold_data_of_their_own(
    kind: type[Scaler], world: World, own: np.random.Generator
) -> None:
    """Only the shares count, and all of them."""
    x = own.normal(size=(60, 2)) + 100 * world.rank
    made = kind.fit(ArrayDataset(x, x), world=world)
    offset, scale = reference(kind, np.concatenate(world.gather(x[list(share(60, world))])))
    np.testing.assert_allclose(made.offset, offset.astype(float), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(made.scale, scale.astype(float), rtol=1e-10)


@by_kind
@pytest.mark.parametrize("n", [1, 2, 60])
@pytest.mark.parametrize("odd", [0, 1])
def test_the_memory_layout_may_differ(
    kind: type[Scaler], odd: int, n: int, world: World, rng: np.random.Generator
) -> None:
    class Transposed(Watched):
        def take(self, indices: np.ndarray) -> tuple[Any, Any]:
            return np.asfortranarray(self.x[indices]), indices

    x = rng.normal(size=(n, 4, 3))
    made = kind.fit((Transposed if world.rank % 2 == odd else Watched)(x), world=world)
    offset, scale = reference(kind, x)
    np.testing.assert_allclose(made.offset, offset.astype(float), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(made.scale, scale.astype(float), rtol=1e-10)


@by_kind
def test_what_one_rank_finds_is_raised_on_all(
    kind: type[Scaler], world: World, rng: np.random.Generator, xp: Any
) -> None:
    x = rng.normal(size=(57, 4))
    row, column = int(rng.integers(1, 57)), int(rng.integers(4))
    x[row, column] = np.nan
    reader = next(r for r in range(world.size) if row < 57 * (r + 1) // world.size)
    message = f"rank {reader}: {kind.__name__}.fit: feature {column} of sample {row} is nan"
    with pytest.raises(InvalidArgument, match=message) as caught:
        kind.fit(ArrayDataset(xp.asarray(x), xp.zeros(57)), world=world)
    assert caught.value.collective


@by_kind
def test_a_file_that_one_rank_cannot_read(
    kind: type[Scaler], world: World, rng: np.random.Generator
) -> None:
    class Damaged(Watched):
        def take(self, indices: np.ndarray) -> tuple[Any, Any]:
            if 59 in indices:
                raise DataError("part 59 is cut short")
            return super().take(indices)

    with pytest.raises(DataError, match=f"rank {world.size - 1}: part 59 is cut short"):
        kind.fit(Damaged(rng.normal(size=(60, 3))), world=world)


@by_kind
def test_data_that_cannot_be(kind: type[Scaler], world: World) -> None:
    last = world.rank == world.size - 1
    with pytest.raises(InvalidArgument, match=f"{kind.__name__}.fit: the data set is empty"):
        kind.fit(ArrayDataset(np.zeros((9 * (not last), 3)), np.zeros(9 * (not last))), world=world)
    if world.size == 1:
        return
    for x in (np.zeros((9 + last, 3)), np.zeros((9, 3 + last))):
        with pytest.raises(RankMismatch, match=rf"rank {world.size - 1}: {kind.__name__}.fit: "):
            kind.fit(ArrayDataset(x, x), world=world)


def test_images_stay_where_they_are(rng: np.random.Generator, xp: Any) -> None:
    """Scaled from uint8 to float32, in GPU memory if they lie there."""
    x = rng.integers(256, size=(9, 3, 2, 2)).astype(np.uint8)
    made = ImageDataset(ArrayDataset(xp.asarray(x), xp.zeros(9)))
    pick = rng.integers(9, size=20)
    found, _ = made.take(pick)
    assert is_device(found) == (xp is not np)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(to_numpy(found), (x[pick] / 255).astype(np.float32))
