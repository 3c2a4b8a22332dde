"""Where all random numbers of layers come from: one stream for weights, one for noise (dropout)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidl.errors import InvalidArgument

NOISE = 1  # stands before the key, so that noise is not the weights' numbers over again

_seed: int | None = None
_key: tuple[int, ...] | None = None
_weights: np.random.Generator | None = None  # made at first use: numpy.random is slow to import
_noise: dict[str, Any] = {}  # array module -> its generator


def seed(value: int) -> None:
    """Make weights and dropout masks drawn from now on a pure function of `value`, 0 or more.

    Raises InvalidArgument for a negative value.
    """
    global _seed, _key, _weights
    _check(value)
    _seed, _key, _weights = value, None, None
    _noise.clear()


def reseed(*key: int) -> None:
    """Make the noise drawn from now on a pure function of `key`, whatever was drawn before.

    With (seed, epoch, step, first sample) masks depend neither on the rank nor on what ran
    earlier. Weights keep their stream. Raises InvalidArgument for a negative number.
    """
    global _key
    _check(*key)
    _key = key
    _noise.clear()


def weights() -> np.random.Generator:
    """Return the generator of first weights. They are drawn on the host, for GPUs too."""
    global _weights
    if _weights is None:
        _weights = np.random.default_rng(_seed)
    return _weights


def generator(xp: Any = np) -> Any:
    """Return the generator of noise of the array module `xp`, numpy or cupy.

    From the same key each gives its own numbers: Philox on a GPU, whose state is cheap to set.
    """
    found = _noise.get(xp.__name__)
    if found is None:
        key = _key if _key is not None else None if _seed is None else (_seed,)
        sequence = np.random.SeedSequence(None if key is None else (NOISE, *key))
        if xp is np:
            found = np.random.default_rng(sequence)
        else:
            found = xp.random.Generator(xp.random.Philox4x3210(sequence))
        _noise[xp.__name__] = found
    return found


def _check(*key: int) -> None:
    if any(number < 0 for number in key):
        raise InvalidArgument(f"seed {', '.join(map(str, key))}: expected numbers of 0 or more")
