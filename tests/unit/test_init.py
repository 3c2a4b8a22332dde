"""Initialisers: moments and bounds against their formulas, and where random numbers come from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import nn
from mpidl.errors import InvalidArgument
from mpidl.nn import init

if TYPE_CHECKING:
    from collections.abc import Callable

Rng = np.random.Generator
SHAPE = (48, 32, 3, 5)  # fans: 480 and 720
FAN_IN, FAN_OUT = 480, 720


@pytest.fixture(autouse=True)
def _fresh_seed(rng: Rng) -> None:
    nn.seed(int(rng.integers(2**31)))


def empty(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> nn.Parameter:
    return nn.Parameter(np.full(shape, np.nan, dtype))


GAIN = 1.7
CASES: dict[str, tuple[Callable[[Any], Any], float]] = {  # name -> how, standard deviation
    "normal": (lambda w: init.normal(w, 0.0, 2.5), 2.5),
    "xavier": (init.xavier_normal, math.sqrt(2 / (FAN_IN + FAN_OUT))),
    "xavier, gain": (
        lambda w: init.xavier_normal(w, GAIN),
        GAIN * math.sqrt(2 / (FAN_IN + FAN_OUT)),
    ),
    "he": (init.he_normal, math.sqrt(2 / FAN_IN)),
    "he, fan_out": (lambda w: init.he_normal(w, mode="fan_out"), math.sqrt(2 / FAN_OUT)),
    "he, slope": (lambda w: init.he_normal(w, slope=0.5), math.sqrt(2 / 1.25 / FAN_IN)),
    "uniform": (lambda w: init.uniform(w, -3.0, 3.0), 3 / math.sqrt(3)),
    "xavier uniform": (init.xavier_uniform, math.sqrt(2 / (FAN_IN + FAN_OUT))),
    "xavier uniform, gain": (
        lambda w: init.xavier_uniform(w, GAIN),
        GAIN * math.sqrt(2 / (FAN_IN + FAN_OUT)),
    ),
    "he uniform": (init.he_uniform, math.sqrt(2 / FAN_IN)),
    "he uniform, fan_out": (lambda w: init.he_uniform(w, mode="fan_out"), math.sqrt(2 / FAN_OUT)),
    "he uniform, slope": (lambda w: init.he_uniform(w, slope=0.5), math.sqrt(2 / 1.25 / FAN_IN)),
    "lecun uniform": (lambda w: init.lecun_uniform(w, 100), 0.1 / math.sqrt(3)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_mean_spread_and_bounds(name: str, dtype: Any) -> None:
    """The bounds on mean and deviation are 6 standard errors of 23,040 values or more."""
    fill, std = CASES[name]
    weight = empty(dtype=dtype)
    memory = weight.data
    assert fill(weight) is weight
    assert weight.data is memory
    assert weight.dtype == dtype
    values = weight.data.astype(np.float64)
    assert abs(values.mean()) < 6 * std / math.sqrt(values.size)
    assert values.std() == pytest.approx(std, rel=6 / math.sqrt(2 * values.size))
    largest = np.abs(values).max() / std
    if "uniform" in name:
        assert 0.99 * math.sqrt(3) < largest <= math.sqrt(3) * (1 + 1e-6)
    else:
        assert 3 < largest < 7
        assert np.mean(np.abs(values) < std) == pytest.approx(0.6827, abs=0.02)


def test_a_mean_and_limits_of_ones_own() -> None:
    assert init.normal(empty(), 5.0, 0.1).data.mean() == pytest.approx(5, abs=0.01)
    values = init.uniform(empty(), 2.0, 3.0).data
    assert values.min() >= 2
    assert values.max() <= 3
    assert values.mean() == pytest.approx(2.5, abs=0.02)


def test_zeros_and_ones() -> None:
    np.testing.assert_array_equal(init.zeros(empty()).data, np.zeros(SHAPE))
    np.testing.assert_array_equal(init.ones(empty()).data, np.ones(SHAPE))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (6, 2, 3, 2), (30, 2, 3)])
def test_orthogonal_rows_or_columns(shape: tuple[int, ...]) -> None:
    weight = init.orthogonal(empty(shape, np.float64), gain=GAIN)
    matrix = weight.data.reshape(shape[0], -1)
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(product, GAIN**2 * np.eye(len(product)), atol=1e-12)


def test_orthogonal_matrices_are_spread_evenly() -> None:
    """QR alone, as LAPACK does it, would give a first entry of one sign always."""
    signs = [init.orthogonal(empty((2, 2), np.float64)).data[0, 0] > 0 for _ in range(64)]
    assert 0 < sum(signs) < 64  # the other way has a chance of 2^-63


def test_arrays_are_filled_too() -> None:
    weight = np.zeros((3, 4))
    assert init.he_normal(weight) is weight
    assert (weight != 0).all()


@pytest.mark.parametrize(
    "fill", ["xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "orthogonal"]
)
def test_a_vector_has_no_fans(fill: str) -> None:
    with pytest.raises(InvalidArgument, match=r"shape \(3,\) has no fans: .* init\.zeros"):
        getattr(init, fill)(empty((3,)))


@pytest.mark.parametrize("fill", [init.he_normal, init.he_uniform])
def test_a_mode_is_fan_in_or_fan_out(fill: Any) -> None:
    with pytest.raises(InvalidArgument, match="mode='fan': expected 'fan_in' or 'fan_out'"):
        fill(empty(), mode="fan")


def test_a_seed_repeats_weights_whatever_noise_was_drawn() -> None:
    def draw(seed: int, noise: int) -> np.ndarray:
        nn.seed(seed)
        nn.random.generator().random(noise)
        return init.normal(empty()).data

    np.testing.assert_array_equal(draw(3, 0), draw(3, 10))
    assert not np.array_equal(draw(3, 0), draw(4, 0))


def test_noise_follows_the_seed_and_is_not_the_weights() -> None:
    def noise(seed: int) -> np.ndarray:
        nn.seed(seed)
        return nn.random.generator().random(100)

    np.testing.assert_array_equal(noise(3), noise(3))
    assert not np.array_equal(noise(3), noise(4))
    nn.seed(3)
    assert not np.array_equal(nn.random.weights().random(100), noise(3))


def test_reseed_makes_noise_a_function_of_the_key() -> None:
    def noise(*key: int) -> np.ndarray:
        nn.random.reseed(*key)
        return nn.random.generator().random(100)

    first = noise(1, 2, 3, 4)
    nn.seed(77)
    nn.random.generator().random(5)
    np.testing.assert_array_equal(noise(1, 2, 3, 4), first)
    for key in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 3, 2, 4)]:
        assert not np.array_equal(noise(*key), first)


def test_reseed_leaves_the_weights_alone() -> None:
    nn.seed(5)
    expected = [init.normal(empty()).data for _ in range(2)]
    nn.seed(5)
    first = init.normal(empty()).data
    nn.random.reseed(1, 2)
    np.testing.assert_array_equal([first, init.normal(empty()).data], expected)


def test_a_seed_ends_what_reseed_set() -> None:
    nn.seed(5)
    expected = nn.random.generator().random(9)
    nn.random.reseed(1)
    nn.seed(5)
    np.testing.assert_array_equal(nn.random.generator().random(9), expected)


def test_without_a_seed_numbers_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for _ in range(2):
        for name, value in {"_seed": None, "_key": None, "_weights": None, "_noise": {}}.items():
            monkeypatch.setattr(nn.random, name, value)
        drawn.append([nn.random.generator().random(), nn.random.weights().random()])
    assert len({x for pair in drawn for x in pair}) == 4


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="seed -1: expected numbers of 0 or more"):
        nn.seed(-1)
    with pytest.raises(InvalidArgument, match="seed 1, -2: expected numbers of 0 or more"):
        nn.random.reseed(1, -2)
