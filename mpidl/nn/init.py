"""Where the first weights come from."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpidl.array import Array

_seed: int | None = None


@cache
def _generator() -> np.random.Generator:
    """Make the generator at first use: numpy.random takes long to import."""
    return np.random.default_rng(_seed)


def seed(value: int) -> None:
    """Make the weights of all layers created from now on a pure function of `value`."""
    global _seed
    _seed = value
    _generator.cache_clear()


def uniform(shape: tuple[int, ...], fan_in: int) -> Array:
    """Return float32 values, uniform in +-1/sqrt(fan_in) (LeCun et al. 1998, section 4.6)."""
    bound = 1 / math.sqrt(max(1, fan_in))
    return _generator().uniform(-bound, bound, shape).astype(np.float32)
