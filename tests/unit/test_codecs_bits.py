"""Each codec against its definition: formats, random rounding, what is largest, signs."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.codecs import Bf16, Fp16, Int8, SignSGD, TopK

from .test_codecs import SIZES, coded, inputs


def finite_bits(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return float32 numbers of random bits, of all magnitudes alike."""
    x = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0))


def ties(unit: float, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return numbers half a unit in the last place away from two, of which one is even."""
    x = (rng.integers(-2048, 2048, size) + 0.5) * unit
    return x.astype(np.float32)


def test_float16_is_that_of_numpy(rng: np.random.Generator) -> None:
    normal_and_not = [ties(2.0**e, rng, 3000) for e in (-24, -15, -14, -13, 0, 4)]
    x = np.concatenate([*normal_and_not, finite_bits(rng, 30001), *inputs(rng, 501).values()])
    x = x.astype(np.float32)
    message = np.empty(2 * x.size, np.uint8)
    Fp16().encode(x, message)
    expected = np.clip(x, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(message.view(np.uint16), expected.view(np.uint16))
    small = x[np.abs(x) < 32768]  # in arrays without large numbers it takes another way
    Fp16().encode(small, message[: 2 * small.size])
    expected = small.astype(np.float16)
    np.testing.assert_array_equal(message[: 2 * small.size].view(np.float16), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stop", [0x7C00, 0x8000])
def test_every_float16_is_decoded(dtype: type, stop: int) -> None:
    halves = np.arange(stop, dtype=np.uint16)
    halves = np.concatenate([halves, halves | 0x8000])
    values = np.empty(halves.size, dtype)
    Fp16().decode(halves.view(np.uint8), values)
    expected = halves.view(np.float16).astype(dtype)
    np.testing.assert_array_equal(values, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(values)[numbers], np.signbit(expected)[numbers])


def test_float16_keeps_what_float64_has_beyond_float32(rng: np.random.Generator) -> None:
    x = rng.standard_normal(100)
    x[:4] = 1e300, -1e300, np.inf, -np.inf
    np.testing.assert_array_equal(coded(Fp16(), x)[:4], [65504, -65504, np.inf, -np.inf])


def test_bfloat16_is_rounded_to_nearest_even(rng: np.random.Generator) -> None:
    exact = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    exact = exact[np.isfinite(exact)]
    np.testing.assert_array_equal(coded(Bf16(), exact), exact)
    x = np.concatenate([finite_bits(rng, 30001), rng.standard_normal(3001), ties(1.0, rng, 3001)])
    x = x[(np.abs(x) > 1e-37) & (np.abs(x) < 3e38)].astype(np.float32)
    significand, exponent = np.frexp(x)
    expected = np.ldexp(np.rint(significand * 256) / 256, exponent)
    np.testing.assert_array_equal(coded(Bf16(), x), expected)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000])
def test_no_bits_of_nan_become_a_number(bits: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal(1000).astype(np.float32)
    x.view(np.uint32)[17] = bits
    for codec in (Bf16(), Fp16()):
        found = coded(codec, x)
        assert np.isnan(found[17]) and np.isnan(found).sum() == 1


def test_int8_is_right_on_average(rng: np.random.Generator) -> None:
    """For each number, as well as many draws tell; and for all of them together."""
    repeats, codec = 1500, Int8(seed=int(rng.integers(2**32)))
    x = rng.standard_normal(4096 + 37).astype(np.float32)
    x[::3] *= 0.01  # between 0 and the first code
    peaks = [np.abs(x[i : i + 256]).max() for i in range(0, x.size, 256)]
    scale = np.repeat(np.array(peaks) / 127, 256)[: x.size]
    errors = np.zeros(x.size)
    for _ in range(repeats):
        errors += (coded(codec, x) - x) / scale
    errors /= repeats
    one = 0.5 / np.sqrt(repeats)  # standard deviation of a mean error, at most
    assert np.abs(errors).max() < 6 * one + 1 / 512
    for towards in (errors, errors * np.sign(x)):  # minus infinity, and 0
        assert abs(towards.mean()) < 6 * one / np.sqrt(x.size)
    fraction = np.abs(x / scale) % 1
    spread = fraction * (1 - fraction)  # the variance of rounding up with that chance
    assert errors.var() == pytest.approx(spread.mean() / repeats, rel=0.15)


def test_int8_codes_are_whole_multiples_of_the_scale(rng: np.random.Generator) -> None:
    for size in SIZES:
        x = rng.standard_normal(size).astype(np.float32)
        found = coded(Int8(), x)
        for start in range(0, size, 256):
            block = slice(start, start + 256)
            scale = np.abs(x[block]).max() / 127
            codes = found[block] / scale
            np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
            assert np.abs(codes).max() == pytest.approx(127)  # and the sign is right:
            np.testing.assert_allclose(found[block], x[block], atol=1.001 * scale)


def test_int8_bits_come_from_seed_and_numbers(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 5000)).astype(np.float32)

    def run(codec: Int8, first: np.ndarray) -> list[np.ndarray]:
        return [coded(codec, values) for values in (np.zeros(300, np.float32), first, x, x)]

    first = run(Int8(), x)
    for found, again in zip(first, run(Int8(), x), strict=True):
        np.testing.assert_array_equal(found, again)
    assert (first[2] != first[3]).mean() > 0.1
    assert (run(Int8(seed=1), x)[2] != first[2]).mean() > 0.1
    assert (run(Int8(), y)[2] != first[2]).mean() > 0.1  # as on another rank


def test_int8_chances_of_neighbours_are_independent(rng: np.random.Generator) -> None:
    """With all fractions at 1/2, the codes are coin flips."""
    x = np.full(32768, 10.5, np.float32)
    x[::256] = 127
    ups = np.delete(coded(Int8(seed=int(rng.integers(2**32))), x), np.s_[::256]) > 10.5
    assert ups.mean() == pytest.approx(0.5, abs=6 * 0.5 / np.sqrt(ups.size))
    for step in (1, 2, 4, 8, 255):
        same = (ups[step:] == ups[:-step]).mean()
        assert same == pytest.approx(0.5, abs=6 * 0.5 / np.sqrt(ups.size))


def test_a_bad_block_of_int8_is_the_only_one(rng: np.random.Generator) -> None:
    x = rng.standard_normal(1000).astype(np.float32)
    x[300] = rng.choice([np.nan, np.inf, -np.inf])
    bad = np.isnan(coded(Int8(), x))
    assert bad[256:512].all() and bad.sum() == 256


@pytest.mark.parametrize("size", [*SIZES, 65536, 65537, 100_001])
def test_topk_keeps_the_largest_as_they_are(size: int, rng: np.random.Generator) -> None:
    x, codec = rng.standard_normal(size).astype(np.float32), TopK(ratio=0.013)
    kept = max(1, round(0.013 * size))
    expected = np.zeros_like(x)
    largest = np.argsort(-np.abs(x), kind="stable")[:kept]
    expected[largest] = x[largest]
    np.testing.assert_array_equal(coded(codec, x), expected)
    assert codec.nbytes(size) == kept * (6 if size <= 65536 else 8)


def test_topk_takes_the_first_of_equals(rng: np.random.Generator) -> None:
    x = rng.integers(-3, 4, 1000).astype(np.float32)
    for kept in (1, 100, 300, 700, 999):
        expected = np.zeros_like(x)
        largest = np.argsort(-np.abs(x), kind="stable")[:kept]
        expected[largest] = x[largest]
        np.testing.assert_array_equal(coded(TopK(ratio=kept / 1000), x), expected)


def test_signs_come_with_the_mean_size(rng: np.random.Generator) -> None:
    for size in SIZES:
        for x in inputs(rng, size).values():
            x = x.astype(np.float32)
            mean = np.float32(np.abs(x.astype(np.float64)).mean())
            np.testing.assert_array_equal(coded(SignSGD(), x), np.copysign(mean, x))
