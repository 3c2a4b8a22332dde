"""Where the elements lie in memory: the same numbers come out, whatever the layout."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, functional
from mpidl.autograd import apply, jvp
from mpidl.autograd.ops.shared import channels_last, in_memory_order

if TYPE_CHECKING:
    from mpidl.array import Array

LARGE = (3, 5, 40, 41)  # more elements than operations take in one go

LAYOUTS: dict[str, Any] = {
    "channels last": lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "transposed": lambda x: x.T.copy().T,
    "axes in the middle": lambda x: x.transpose(1, 3, 0, 2).copy().transpose(2, 0, 3, 1),
    "negative strides": lambda x: x[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "all reversed": lambda x: x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "every other": lambda x: x.repeat(2, axis=3)[..., ::2],
    "a row repeated": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "a sample repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "one number": lambda x: np.broadcast_to(x[-1, -1, -1, -1], x.shape),
    "channels last, repeated": lambda x: np.broadcast_to(
        x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)[:, :1], x.shape
    ),
    "with axes of one": lambda x: x.reshape(len(x), 1, -1, 1).transpose(2, 3, 0, 1).copy().T,
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu": {"approximate": "none"},
    "gelu tanh": {"approximate": "tanh"},
    "leaky_relu": {"slope": 0.1},
    "max_pool2d": {"size": (2, 3), "stride": 2, "padding": 1},
    "avg_pool2d": {"size": 2},
    "softmax": {"axis": 1},
    "sum": {"axis": (0, 2), "keepdims": False},
    "max": {"axis": 1, "keepdims": False},
    "layer_norm": {"eps": 0.1},
    "conv2d": {"padding": 1},
}


def run(name: str, x: Array, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    leaf = Tensor(x, requires_grad=True)
    more: list[Array] = []
    if name == "layer_norm":
        more = [np.linspace(1, 2, x.shape[-1], dtype=x.dtype)] * 2
    if name == "conv2d":
        more = [np.sin(np.arange(2 * x.shape[1] * 9, dtype=x.dtype)).reshape(2, x.shape[1], 3, 3)]
    return leaf, apply(name.split()[0], leaf, *more, **OPERATIONS[name])


@pytest.mark.parametrize("shape", [LARGE, (2, 3, 4, 5), (30000, 1, 1, 1), (1, 1, 20000, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_memory_order_keeps_elements_together(
    layout: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x = LAYOUTS[layout](rng.standard_normal(shape))
    for first in (x, np.empty_like(x), np.empty_like(x, dtype=bool)):
        flat, pairs = in_memory_order(first, x, x + 1)[0], in_memory_order(first, x, x + 1)[1:]
        assert flat.shape == pairs[0].shape == (x.size,)
        np.testing.assert_array_equal(pairs[0] + 1, pairs[1])
        np.testing.assert_array_equal(np.sort(pairs[0]), np.sort(x, axis=None))
        if first is not x:
            assert np.shares_memory(flat, first)  # written to, it fills what it is a view of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_layout_gives_what_a_contiguous_copy_gives(
    name: str, layout: str, rng: np.random.Generator
) -> None:
    x = LAYOUTS[layout](rng.standard_normal(LARGE).astype(np.float32))
    if "2d" in name and min(x.shape[2:]) < 3:
        x = x.reshape(LARGE)
    copy = x.copy("C")
    (leaf, y), (plain, expected) = run(name, x, rng), run(name, copy, rng)
    np.testing.assert_allclose(y.data, expected.data, rtol=1e-5, atol=1e-5)
    weights = rng.standard_normal(y.shape).astype(np.float32)
    turned = weights.T.copy().T
    y.backward(turned)
    expected.backward(weights)
    np.testing.assert_allclose(leaf.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu tanh"])
def test_large_and_small_arrays_take_two_ways_to_the_same_result(
    name: str, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(50_000)
    v = rng.standard_normal(x.size)
    options = OPERATIONS[name]
    whole, change = jvp(lambda t: apply(name.split()[0], t, **options), x, v)
    for part in np.split(np.arange(x.size), 5):
        value, moved = jvp(lambda t: apply(name.split()[0], t, **options), x[part], v[part])
        np.testing.assert_allclose(whole[part], value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(change[part], moved, rtol=1e-12, atol=1e-12)


def test_pictures_stay_channels_last(rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((2, 3, 12, 12)), rng.standard_normal((16, 3, 3, 3))
    y = functional.conv2d(x, weight, padding=1)
    results = [
        y,
        functional.relu(y),
        functional.gelu(y),
        y + 1.0,
        functional.max_pool2d(y, 2),
        functional.avg_pool2d(y, 3, padding=1),
        functional.conv2d(y, rng.standard_normal((4, 16, 1, 1))),
    ]
    for each in results:
        assert each.data.transpose(0, 2, 3, 1).flags.c_contiguous
        assert channels_last(each.data).base is not None  # a view, not a copy


def test_channels_last_copies_only_what_lies_otherwise(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 4, 5))
    found = channels_last(x)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, x.transpose(0, 2, 3, 1))
    assert np.shares_memory(channels_last(found.transpose(0, 3, 1, 2)), found)
    assert not np.shares_memory(found, x)


def test_a_network_on_pictures_of_any_layout(rng: np.random.Generator) -> None:
    base = rng.standard_normal((4, 3, 10, 10))
    arrays = [rng.standard_normal(s) for s in ((6, 3, 3, 3), (6,), (6, 1, 3, 3))]

    def network(x: Array) -> list[Array]:
        leaves = [Tensor(a, requires_grad=True) for a in (x, *arrays)]
        y = functional.relu(functional.conv2d(*leaves[:3], padding=1))
        y = functional.max_pool2d(y + functional.gelu(y), 2)
        y = functional.conv2d(y, leaves[3], groups=6, padding=1)
        (y * y).sum().backward()
        return [y.data, *(leaf.grad for leaf in leaves)]

    for layout in ("channels last", "transposed", "all reversed", "every other"):
        expected = network(base)
        for a, b in zip(expected, network(LAYOUTS[layout](base)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9)


def test_attention_in_several_blocks_is_attention_in_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [rng.standard_normal((5, 2, 3, 4)) for _ in range(3)]
    mask, drop = rng.integers(0, 2, (5, 1, 3, 3)).astype(bool), rng.random((5, 2, 3, 3))
    results = []
    for limit in (1 << 20, 2 * 2 * 9 * 8, 1):
        monkeypatch.setattr(import_module("mpidl.autograd.ops.attention"), "BLOCK_BYTES", limit)
        leaves = [Tensor(a, requires_grad=True) for a in arrays]
        y = functional.attention(*leaves, mask=mask, drop=drop)
        (y * y).sum().backward()
        results.append([y.data, *(t.grad for t in leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


def test_convolution_in_several_blocks_is_convolution_in_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = rng.standard_normal((5, 2, 6, 6)), rng.standard_normal((4, 1, 3, 3))
    results = []
    for limit in (1 << 20, 2 * 36 * 2 * 9 * 8, 1):  # the last block of two samples is a single one
        monkeypatch.setattr(import_module("mpidl.autograd.ops.windows"), "BLOCK_BYTES", limit)
        leaves = [Tensor(a, requires_grad=True) for a in (x, weight)]
        y = functional.conv2d(*leaves, padding=1, groups=2)
        (y * y).sum().backward()
        results.append([y.data, *(t.grad for t in leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


def test_attention_casts_no_memory_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to be there, taken as float64, is too large for float32: a RuntimeWarning."""
    q, k, v = (np.ones((3, n), np.float32) for n in (4, 4, 2))

    def used(shape: Any, dtype: Any = np.float64) -> Array:
        return np.full(shape, np.finfo(dtype).max, dtype)

    monkeypatch.setattr(np, "empty", used)
    np.testing.assert_allclose(functional.attention(q, k, v).data, v, rtol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "getitem"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("width", [1, 3, 700])
def test_rows_picked_often_add_up_as_numpy_adds_them(
    kind: str, dtype: type, order: str, width: int, rng: np.random.Generator
) -> None:
    """Unsorted, more than a block of them; the places in memory pass what int8 can count."""
    table = Tensor(np.array(rng.standard_normal((300, width)), order=order), requires_grad=True)
    rows = rng.integers(0, 100, 3000).astype(dtype)
    rows[rng.random(3000) < 0.5] = 7
    if kind == "getitem" and np.dtype(dtype).kind == "i":
        rows[::5] -= 100  # counted from the end
    y = functional.embedding(rows, table) if kind == "embedding" else table[rows]
    np.testing.assert_array_equal(y.data, table.data[rows])
    weights = rng.standard_normal((width, 3000)).T  # the incoming gradient is not contiguous
    expected = np.zeros((300, width))
    np.add.at(expected, rows.astype(int), weights)
    for times in (1, 2):
        (functional.embedding(rows, table) if kind == "embedding" else table[rows]).backward(
            weights
        )
        np.testing.assert_array_equal(table.grad, times * expected)
