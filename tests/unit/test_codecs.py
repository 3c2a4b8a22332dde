"""Every codec: how far off its numbers are, how long its messages, and what it does with NaN."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpidl import codecs
from mpidl.codecs import Bf16, Fp16, Int8, PowerSGD, SignSGD, TopK
from mpidl.errors import InvalidArgument

Bound = Callable[[Any, np.ndarray], Any]

SIZES = [1, 2, 7, 8, 9, 255, 256, 257, 1001, 32767, 32768]
FLOAT32 = np.finfo(np.float32)


def half_bound(_, x):
    """Half a unit in the last of 11 bits, or of the subnormals; all of it beyond the range."""
    beyond = np.maximum(np.abs(x) - 65504, 0)
    return np.maximum(np.abs(x) * 2**-11, 2**-25) + beyond


def bfloat16_bound(_, x):
    """Half a unit in the last of 8 bits, or of the subnormals."""
    return np.maximum(np.abs(x) * 2**-8, 2.0**-134)


def int8_bound(codec, x):
    """One scale of the block, and a little for float32; blocks of very small numbers vanish."""
    peaks = np.maximum.reduceat(np.abs(x), np.arange(0, x.size, codec.block))
    scale = np.repeat(peaks / 127, codec.block)[: x.size]
    return np.where(scale < 1e-36, 127.1 * scale, (1 + 1e-5) * scale)


def topk_bound(codec, x):
    """All of those that are left out, and nothing of the others."""
    sizes = np.sort(np.abs(x))[::-1]
    least = sizes[max(1, round(codec.ratio * x.size)) - 1]
    return np.where(np.abs(x) > least, 0, np.abs(x))


def sign_bound(_, x):
    """How far a number's size is from the mean."""
    mean = np.abs(x).mean()
    return np.abs(np.abs(x) - mean) + mean * 2**-22


#: codec, its bytes for n numbers, and the most that a number may be off
CASES: list[tuple[Any, Callable[[int], int], Bound]] = [
    (Bf16(), lambda n: 2 * n, bfloat16_bound),
    (Fp16(), lambda n: 2 * n, half_bound),
    (Int8(), lambda n: n + 4 * -(-n // 256), int8_bound),
    (Int8(block=7, seed=3), lambda n: n + 4 * -(-n // 7), int8_bound),
    (Int8(block=1), lambda n: 5 * n, int8_bound),
    (SignSGD(), lambda n: 4 + (n + 7) // 8, sign_bound),
    (TopK(), lambda n: 6 * max(1, round(n / 100)), topk_bound),
    (TopK(ratio=0.37), lambda n: 6 * max(1, round(0.37 * n)), topk_bound),
    (TopK(ratio=1), lambda n: 6 * n, topk_bound),
]
NAMES = [str(case[0]) for case in CASES]
UNCHANGING = [case[0] for case in CASES if not isinstance(case[0], Int8)]  # no random bits
every_codec = pytest.mark.parametrize("codec", [case[0] for case in CASES], ids=NAMES)


def fresh(codec):
    """Return a codec with these options that has encoded nothing yet."""
    return eval(repr(codec), vars(codecs))


def coded(codec, x: np.ndarray) -> np.ndarray:
    """Return what becomes of `x`."""
    message, values = np.empty(codec.nbytes(x.size), np.uint8), np.full_like(x, 7)
    codec.encode(x, message)
    codec.decode(message, values)
    return values


def inputs(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """Return arrays (size,) of many kinds."""
    x = rng.standard_normal(size)
    sparse = np.where(rng.random(size) < 0.9, 0, x)
    return {
        "normal": x,
        "gradients": 1e-6 * x,
        "all magnitudes": np.sign(x) * 10 ** rng.uniform(-44, 38, size),
        "half's magnitudes": np.sign(x) * 2 ** rng.uniform(-27, 17, size),
        "sparse": sparse,
        "zeros": np.zeros(size),
        "minus zeros": -np.zeros(size),
        "equal": np.full(size, x[0]),
        "large": np.full(size, 3.3e38) * np.sign(x),
        "subnormal": 1e-41 * x,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("codec", "nbytes", "bound"), CASES, ids=NAMES)
def test_numbers_are_off_by_no_more_than_the_bound(
    codec: Any, nbytes: Any, bound: Bound, dtype: Any, rng: np.random.Generator
) -> None:
    for size in (*SIZES, *rng.integers(1, 32768, 3)):
        for kind, x in inputs(rng, size).items():
            x = x.astype(dtype)
            off = np.abs(coded(codec, x).astype(np.float64) - x)
            # float64 is rounded to float32 on its way
            slack = np.abs(x) * 2.0**-22 + float(FLOAT32.smallest_subnormal)
            most = bound(codec, x.astype(np.float32).astype(np.float64)) + slack
            assert (off <= most).all(), (kind, size, (off - most).max())


@pytest.mark.parametrize(("codec", "nbytes", "bound"), CASES, ids=NAMES)
def test_messages_are_as_long_as_stated(
    codec: Any, nbytes: Any, bound: Bound, rng: np.random.Generator
) -> None:
    """All bytes are written, whatever stood there, and none beside; at any address."""
    for size, factor in itertools.product(SIZES, (1, 0)):
        assert codec.nbytes(size) == nbytes(size)
        x = factor * rng.standard_normal(size).astype(np.float32)
        kept, messages = x.copy(), []
        for start, fill in ((0, 0), (1, 255), (2, 85)):
            memory = np.full(codec.nbytes(size) + 4, fill, np.uint8)
            message = memory[start : start + codec.nbytes(size)]
            fresh(codec).encode(x, message)
            messages.append(message.tobytes())
            message[:] = fill
            assert (memory == fill).all()
        np.testing.assert_array_equal(x, kept)
        assert len(set(messages)) == 1


@every_codec
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoding_depends_on_the_message_alone(
    codec: Any, dtype: Any, rng: np.random.Generator
) -> None:
    """Not on what the codec did before, nor on what stood in the array; and it writes no more."""
    for size in SIZES:
        message = np.empty(codec.nbytes(size), np.uint8)
        codec.encode(rng.standard_normal(size).astype(dtype), message)
        first = np.full(size, 9, dtype)
        codec.decode(message, first)
        coded(codec, rng.standard_normal(2 * size))
        memory = np.full(size + 2, np.nan, dtype)
        message.flags.writeable = False
        codec.decode(message, memory[1:-1])
        np.testing.assert_array_equal(memory[1:-1], first)
        assert np.isnan(memory[[0, -1]]).all()
        fresh(codec).decode(message, memory[1:-1])
        np.testing.assert_array_equal(memory[1:-1], first)


@pytest.mark.parametrize("codec", UNCHANGING, ids=str)
def test_encoding_depends_on_the_numbers_alone(codec: Any, rng: np.random.Generator) -> None:
    """A codec that has worked on other sizes and dtypes writes what a new one writes."""
    used = fresh(codec)
    for size in rng.permutation(SIZES):
        for dtype in (np.float64, np.float32):
            x = rng.standard_normal(size).astype(dtype)
            message, again = np.empty((2, codec.nbytes(size)), np.uint8)
            used.encode(x, message)
            fresh(codec).encode(x, again)
            np.testing.assert_array_equal(message, again)


@every_codec
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_bad_number_is_seen(codec: Any, dtype: Any, bad: float, rng: np.random.Generator) -> None:
    for size in SIZES:
        x = rng.standard_normal(size).astype(dtype)
        place = rng.integers(size)
        x[place] = bad
        found = coded(codec, x)
        assert not np.isfinite(found[place])
        if np.isnan(bad) or isinstance(codec, Int8):
            assert np.isnan(found[place])
        elif not isinstance(codec, SignSGD):
            assert found[place] == bad


@every_codec
def test_any_bits_will_do(codec: Any, rng: np.random.Generator) -> None:
    """Warnings are errors: of overflow, or of the signalling NaN that are among them."""
    for dtype in (np.float32, np.float64):
        x = rng.integers(0, 256, 8 * 4000, dtype=np.uint8).view(dtype)
        found = coded(codec, x)
        if not isinstance(codec, SignSGD | TopK):
            assert not np.isfinite(found[~np.isfinite(x)]).any()


@every_codec
def test_nothing_is_encoded_to_nothing(codec: Any) -> None:
    assert codec.nbytes(0) <= 4
    assert coded(codec, np.empty(0, np.float32)).size == 0


@every_codec
def test_codecs_can_be_written_down(codec: Any, rng: np.random.Generator) -> None:
    coded(codec, rng.standard_normal(100))
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec == fresh(codec)
    assert hash(copy) == hash(codec)
    with pytest.raises(AttributeError):
        codec.block = codec.ratio = 1


def test_every_name_is_tested() -> None:
    made = {type(codecs.make(name)) for name in codecs.CODECS}
    assert made - {PowerSGD} == {type(case[0]) for case in CASES}  # which has no messages of pieces


def test_codecs_are_made_of_names_and_instances() -> None:
    codec = Int8(block=64)
    assert codecs.make(codec) == codec
    assert codecs.make(codec) is not codec  # which another thread may use
    assert codecs.make(None) is None
    assert codecs.make("int8") == Int8()
    for name in codecs.CODECS:
        assert codecs.make(name) is not codecs.make(name)  # each has memory of its own
    known = r"'zip'; known are: bf16, fp16, int8, .*signsgd, topk"
    with pytest.raises(InvalidArgument, match=known):
        codecs.make("zip")
    with pytest.raises(InvalidArgument, match=r"expected a name or TopK\(...\)"):
        codecs.make(TopK)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Int8, {"block": 0}), (Int8, {"seed": -1}), *((TopK, {"ratio": r}) for r in (0, -1, 1.01))],
)
def test_options_out_of_range(kind: Any, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(InvalidArgument, match=rf"{kind.__name__}\(.*{name}={value}.*expected"):
        kind(**options)


def test_nan_is_no_ratio() -> None:
    with pytest.raises(InvalidArgument, match="ratio=nan"):
        TopK(ratio=np.nan)
