"""Every operation's derivatives, in both modes, on fresh random input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpidl import Tensor, functional
from mpidl.autograd import OPS, apply, check_gradients, jvp
from tests.unit.draws import distinct, positive, values
from tests.unit.operations import CASES, EINSUMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

ROUNDS = 20  # fresh shapes each
BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
REDUCTIONS = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "var": np.var}


def strided(x: Array) -> Array:
    """Return a view with the values of `x`, of every other element of a larger array."""
    large = np.full(tuple(2 * n for n in x.shape), np.nan)
    view = large[(..., *(slice(None, None, 2) for _ in x.shape))]
    view[...] = x
    return view


def transposed(x: Array) -> Array:
    return x.T.copy().T


def rotated(x: Array) -> Array:
    """Return a view whose first axis lies innermost: a picture with its channels last."""
    return np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0) if x.ndim else x


def reversed_(x: Array) -> Array:
    flip = (..., *(slice(None, None, -1) for _ in x.shape))
    return x[flip].copy()[flip]


def repeated(x: Array) -> Array:
    """Return a view of stride 0 along every other axis, with the values of the first place."""
    first = tuple(slice(0, 1) if axis % 2 == 0 else slice(None) for axis in range(x.ndim))
    return np.broadcast_to(x[first] if x.size else x, x.shape)


def test_the_table_names_every_operation() -> None:
    assert sorted(CASES) == sorted(OPS)


@pytest.mark.parametrize("name", CASES)
def test_the_case_runs_the_operation_it_is_named_after(name: str, rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        function, arrays = CASES[name](rng)
        result = function(*(Tensor(a, requires_grad=True) for a in arrays))
        assert result.node is not None
        assert result.node.name == name


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_numeric_ones(name: str, rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        function, arrays = CASES[name](rng)
        check_gradients(function, *arrays)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_numeric_ones_inside_a_larger_graph(
    name: str, rng: np.random.Generator
) -> None:
    """Here inputs and the incoming gradient are results of other operations, and strided."""
    for _ in range(ROUNDS // 2):
        function, arrays = CASES[name](rng)
        check_gradients(
            lambda *a, f=function: (f(*(x.T.T * 1.0 for x in a)).T * 0.5).sum(), *arrays
        )


VIEWS = [strided, transposed, rotated, reversed_, repeated]


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_non_contiguous_array_gives_what_its_copy_gives(
    name: str, view: Callable[[Array], Array], rng: np.random.Generator
) -> None:
    """As a leaf, and as the incoming gradient."""
    for _ in range(3):
        function, arrays = CASES[name](rng)
        views = [Tensor(view(a), requires_grad=True) for a in arrays]
        copies = [Tensor(v.data.copy("C"), requires_grad=True) for v in views]
        expected, found = function(*copies), function(*views)
        np.testing.assert_allclose(found.data, expected.data, rtol=1e-12, atol=1e-12)
        weights = view(values(rng, expected.shape))
        expected.backward(weights.copy("C"))
        found.backward(weights)
        for a, b in zip(copies, views, strict=True):
            assert a.grad is not None
            np.testing.assert_allclose(b.grad, a.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_non_contiguous_direction_gives_what_its_copy_gives(
    name: str, view: Callable[[Array], Array], rng: np.random.Generator
) -> None:
    function, arrays = CASES[name](rng)
    points = tuple(view(a) for a in arrays)
    directions = tuple(view(values(rng, a.shape)) for a in arrays)
    value, change = jvp(function, points, directions)
    expected = jvp(function, *(tuple(x.copy("C") for x in xs) for xs in (points, directions)))
    np.testing.assert_allclose(value, expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(change, expected[1], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(BINARY)),
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4, max_side=3),
    seed=st.integers(0, 2**32),
)
def test_binary_operations_broadcast_like_numpy(
    name: str, shapes: hnp.BroadcastableShapes, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = (positive(rng, s) for s in shapes.input_shapes)
    result = apply(name, Tensor(x), Tensor(y))
    assert result.shape == shapes.result_shape
    np.testing.assert_array_equal(result.data, BINARY[name](x, y))
    check_gradients(lambda a, b: apply(name, a, b), x, y)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_reductions_take_the_axes_that_numpy_takes(data: st.DataObject, seed: int) -> None:
    name = data.draw(st.sampled_from(sorted(REDUCTIONS)))
    least = 0 if name == "sum" else 1
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=least, max_side=4))
    axis = data.draw(st.none() | hnp.valid_tuple_axes(len(shape)))
    if axis and len(axis) == 1 and data.draw(st.booleans()):
        axis = axis[0]
    keepdims = data.draw(st.booleans())
    x = distinct(np.random.default_rng(seed), shape)

    def function(t: Tensor) -> Tensor:
        options: dict[str, Any] = {"correction": 0} if name == "var" else {}
        return apply(name, t, axis=axis, keepdims=keepdims, **options)

    expected = REDUCTIONS[name](x, axis=axis, keepdims=keepdims)
    found = function(Tensor(x))
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.data, expected, rtol=1e-12, atol=1e-12)
    check_gradients(function, x)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_convolutions_of_any_geometry(data: st.DataObject, seed: int) -> None:
    """Against the sum over windows, written out, and numeric derivatives."""
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    groups, (n, c, o) = draw(1, 3), (draw(0, 2), draw(1, 2), draw(1, 2))
    kernel, stride, padding, dilation = (
        (draw(least, most), draw(least, most)) for least, most in ((1, 3), (1, 3), (0, 3), (1, 3))
    )
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 3)
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    rng = np.random.default_rng(seed)
    shapes = (n, groups * c, *size), (groups * o, c, *kernel), (groups * o,)
    x, weight, bias = (values(rng, s) for s in shapes)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    found = functional.conv2d(x, weight, bias, groups=groups, **options)
    expected = windows_summed(x, weight, groups=groups, **options) + bias[:, None, None]
    np.testing.assert_allclose(found.data, expected, rtol=1e-10, atol=1e-10)
    check_gradients(lambda *a: functional.conv2d(*a, groups=groups, **options), x, weight, bias)


def windows_summed(
    x: Array, weight: Array, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Array:
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    (o, c, kh, kw) = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    high = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    wide = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((len(x), o, high, wide))
    for channel, i, j in np.ndindex(o, high, wide):
        start = channel // (o // groups) * c
        part = padded[:, start : start + c, i * sh :: dh, j * sw :: dw][:, :, :kh, :kw]
        y[:, channel, i, j] = (part * weight[channel]).sum(axis=(1, 2, 3))
    return y


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_pooling_of_any_geometry(data: st.DataObject, seed: int) -> None:
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    kernel, stride = ((draw(1, 4), draw(1, 4)) for _ in range(2))
    padding = tuple(draw(0, k // 2) for k in kernel)
    size = [max(1, k - 2 * p) + draw(0, 4) for k, p in zip(kernel, padding, strict=True)]
    x = distinct(np.random.default_rng(seed), (draw(0, 2), draw(1, 2), *size))
    options: dict[str, Any] = {"size": kernel, "stride": stride, "padding": padding}
    for name, function, around in (("max", np.max, -np.inf), ("avg", np.mean, 0.0)):
        widths = ((0, 0), (0, 0), *((p, p) for p in padding))
        padded = np.pad(x, widths, constant_values=around)
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3))
        expected = function(windows[:, :, :: stride[0], :: stride[1]], axis=(4, 5))
        found = apply(f"{name}_pool2d", x, **options)
        np.testing.assert_allclose(found.data, expected, rtol=1e-12, atol=1e-12)
        check_gradients(lambda t, name=name: apply(f"{name}_pool2d", t, **options), x)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_einsum_is_numpys(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if data.draw(st.booleans()):
        subscripts = data.draw(st.sampled_from(EINSUMS.split()))
    else:
        letters = st.text("abc", max_size=3)
        terms = data.draw(st.lists(letters, min_size=1, max_size=3))
        seen = sorted(set("".join(terms)))
        output = "".join(data.draw(st.permutations(seen)))[: data.draw(st.integers(0, 3))]
        subscripts = f"{','.join(terms)}->{output}"
    dots = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=2))
    lengths = {c: data.draw(st.integers(1, 3)) for c in sorted(set(subscripts)) if c.isalpha()}
    arrays = []
    for term in subscripts.split("->")[0].split(","):
        before, found, after = term.partition("...")
        middle = dots[data.draw(st.integers(0, len(dots))) :] if found else ()
        arrays.append(
            values(rng, (*(lengths[c] for c in before), *middle, *(lengths[c] for c in after)))
        )
    result = functional.einsum(subscripts, *arrays)
    expected = np.einsum(subscripts, *arrays)
    assert result.shape == np.shape(expected)
    np.testing.assert_allclose(result.data, expected, rtol=1e-10, atol=1e-10)
    check_gradients(lambda *xs: functional.einsum(subscripts, *xs), *arrays)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 15, 16, 17, -1, -3, 3.0, 16.0, 2.5, 0.5])
def test_a_power_is_numpys(n: float, rng: np.random.Generator) -> None:
    """Whole powers up to 16 are products; the others are what NumPy makes."""
    x = rng.uniform(0.7, 1.4, (3, 4)) * (rng.choice([-1, 1], (3, 4)) if n == int(n) else 1)
    found = Tensor(x) ** n
    np.testing.assert_allclose(found.data, x**n, rtol=1e-14)
    assert (Tensor(x.astype(np.float32)) ** n).dtype == np.float32
    check_gradients(lambda t: t**n, x)


def test_the_square_root_as_a_power_of_a_negative_number_is_nan() -> None:
    with np.errstate(invalid="ignore"):
        assert np.isnan((Tensor(np.array([-1.0])) ** 0.5).data)


def test_a_power_of_1_is_in_memory_of_its_own() -> None:
    x = Tensor(np.ones(2))
    assert not np.shares_memory((x**1).data, x.data)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((64, 32, 128), (128,)),
        ((2, 3, 4, 5), (5, 6)),
        ((2, 3, 4), (4, 1)),
        ((0, 3, 4), (4, 2)),
        ((2, 0, 4), (4,)),
        ((2, 3, 0), (0, 2)),
    ],
)
def test_a_product_of_many_rows(
    left: tuple[int, ...], right: tuple[int, ...], rng: np.random.Generator
) -> None:
    """As one matrix of all rows: values of NumPy's matmul, gradients of NumPy's einsum."""
    arrays = rng.standard_normal(left), rng.standard_normal(right)
    leaves = [Tensor(a, requires_grad=True) for a in (arrays[0].copy("F"), arrays[1].copy("F"))]
    y = leaves[0] @ leaves[1]
    np.testing.assert_allclose(y.data, arrays[0] @ arrays[1], rtol=1e-11, atol=1e-11)
    weights = rng.standard_normal(y.shape)
    y.backward(weights)
    n, end = math.prod(left[:-1]), right[1:]
    m = "m" if end else ""
    to_x = np.einsum(f"...{m},k{m}->...k", weights, arrays[1])
    rows = arrays[0].reshape(n, left[-1])
    to_y = np.einsum(f"nk,n{m}->k{m}", rows, weights.reshape(n, *end))
    for leaf, expected in zip(leaves, (to_x, to_y), strict=True):
        np.testing.assert_allclose(leaf.grad, expected, rtol=1e-10, atol=1e-10)
    changes = [rng.standard_normal(a.shape) for a in arrays]
    change = jvp(lambda x, y: x @ y, arrays, tuple(changes))[1]
    expected = changes[0] @ arrays[1] + arrays[0] @ changes[1]
    np.testing.assert_allclose(change, expected, rtol=1e-10, atol=1e-10)
