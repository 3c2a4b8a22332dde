"""Fresh random shapes and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpidl.array import Array

Rng = np.random.Generator


def shape(rng: Rng, ndim: int | None = None) -> tuple[int, ...]:
    """Return a random shape of `ndim` axes, 0 to 3 by default, each of 1 to 4 elements."""
    return tuple(map(int, rng.integers(1, 5, rng.integers(0, 4) if ndim is None else ndim)))


def pick(rng: Rng, options: Any) -> Any:
    """Return one of `options`, as it is."""
    return options[int(rng.integers(len(options)))]


def flip(rng: Rng) -> bool:
    return bool(rng.integers(2))


def values(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Return values of both signs, of size 0.1 to 2: away from 0, where |x| and 1/x have kinks."""
    return np.asarray(rng.uniform(0.1, 2, shape) * rng.choice([-1, 1], shape))


def positive(rng: Rng, shape: tuple[int, ...]) -> Array:
    return np.asarray(rng.uniform(0.1, 2, shape))


def distinct(rng: Rng, shape: tuple[int, ...], offset: float = 0.05) -> Array:
    """Return values 0.1 apart: the largest of them stays the largest beside a small step."""
    size = int(np.prod(shape))
    return np.asarray((rng.permutation(size) - size // 2).reshape(shape) * 0.1 + offset)


def broadcast_shapes(rng: Rng) -> list[tuple[int, ...]]:
    """Return two shapes, either of which may be stretched along some axes."""
    whole = shape(rng)
    both = [tuple(n if flip(rng) else 1 for n in whole) for _ in range(2)]
    both[0] = both[0][int(rng.integers(0, len(whole) + 1)) :]
    return both if flip(rng) else both[::-1]


def some_shape(rng: Rng) -> tuple[int, ...]:
    """Return a random shape; one in eight has no elements."""
    drawn = shape(rng)
    return (*drawn, 0) if rng.integers(8) == 0 else drawn
