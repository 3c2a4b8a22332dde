"""Every operation's value and adjoints, on fresh random input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpidl import Tensor, nn, tensor
from mpidl.autograd import OPS, apply, check_gradients
from mpidl.errors import AutogradError
from tests.unit.operations import CASES, values

if TYPE_CHECKING:
    from mpidl.array import Array

ROUNDS = 20  # fresh shapes each
BINARY = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide}


def strided(x: Array) -> Array:
    """Return a view with the values of `x`, of every other element of a larger array."""
    large = np.full(tuple(2 * n for n in x.shape), np.nan)
    view = large[(..., *(slice(None, None, 2) for _ in x.shape))]
    view[...] = x
    return view


def transposed(x: Array) -> Array:
    return x.T.copy().T


def reversed_(x: Array) -> Array:
    flip = (..., *(slice(None, None, -1) for _ in x.shape))
    return x[flip].copy()[flip]


def test_the_table_names_every_operation() -> None:
    assert sorted(CASES) == sorted(OPS)


@pytest.mark.parametrize("name", CASES)
def test_the_case_runs_the_operation_it_is_named_after(name: str, rng: np.random.Generator) -> None:
    function, arrays = CASES[name](rng)
    result = function(*(Tensor(a, requires_grad=True) for a in arrays))
    assert result.node is not None
    assert result.node.name == name


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_numeric_one(name: str, rng: np.random.Generator) -> None:
    for _ in range(ROUNDS):
        function, arrays = CASES[name](rng)
        check_gradients(function, *arrays)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_numeric_one_inside_a_larger_graph(
    name: str, rng: np.random.Generator
) -> None:
    """Here inputs and the incoming gradient are results of other operations, and strided."""
    for _ in range(ROUNDS):
        function, arrays = CASES[name](rng)
        check_gradients(
            lambda *a, f=function: (f(*(x.T.T * 1.0 for x in a)).T * 0.5).sum(), *arrays
        )


@pytest.mark.parametrize("view", [strided, transposed, reversed_], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_non_contiguous_leaf_gives_what_its_copy_gives(
    name: str, view, rng: np.random.Generator
) -> None:
    function, arrays = CASES[name](rng)
    copies = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    views = [Tensor(view(a), requires_grad=True) for a in arrays]
    expected, found = function(*copies), function(*views)
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-12, atol=1e-12)
    weights = values(rng, expected.shape)
    expected.backward(weights)
    found.backward(view(weights))
    for a, b in zip(copies, views, strict=True):
        np.testing.assert_allclose(b.grad, a.grad, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(BINARY)),
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4, max_side=3),
    seed=st.integers(0, 2**32),
)
def test_binary_operations_broadcast_like_numpy(
    name: str, shapes: hnp.BroadcastableShapes, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = (values(rng, s) for s in shapes.input_shapes)
    result = apply(name, Tensor(x), Tensor(y))
    assert result.shape == shapes.result_shape
    np.testing.assert_array_equal(result.data, BINARY[name](x, y))
    check_gradients(lambda a, b: apply(name, a, b), x, y)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2), -1])
@pytest.mark.parametrize("keepdims", [False, True])
def test_mean(axis: int | tuple[int, ...] | None, keepdims: bool, rng: np.random.Generator) -> None:
    x = values(rng, (2, 3, 4))
    expected = x.mean(axis, keepdims=keepdims)
    found = Tensor(x).mean(axis, keepdims=keepdims).data
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    check_gradients(lambda t: t.mean(axis, keepdims=keepdims), x)


def test_relu_has_derivative_0_at_0() -> None:
    x = tensor([0.0, -0.0], requires_grad=True)
    apply("relu", x).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_power_0_has_derivative_0_everywhere() -> None:
    x = tensor([0.0, 1.0], requires_grad=True)
    (x**0).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_sigmoid_does_not_overflow(size: float) -> None:
    x = tensor([-size, size], requires_grad=True)
    y = apply("sigmoid", x)
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [0, 1])
    np.testing.assert_array_equal(x.grad, [0, 0])


@pytest.mark.parametrize("loss", [nn.mse, nn.l1])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_a_loss_of_nothing_is_0(loss, shape: tuple[int, ...]) -> None:
    x = Tensor(np.zeros(shape, np.float32), requires_grad=True)
    result = loss(x, np.zeros(shape, np.float32))
    result.backward()
    assert result.item() == 0
    assert x.grad is not None
    assert x.grad.shape == shape


def test_cross_entropy_of_nothing_is_0() -> None:
    x = Tensor(np.zeros((0, 10), np.float32), requires_grad=True)
    result = nn.cross_entropy(x, np.zeros(0, np.int64))
    result.backward()
    assert result.item() == 0
    assert x.grad is not None
    assert x.grad.shape == (0, 10)


def test_linear_of_no_rows_gives_zero_gradients(rng: np.random.Generator) -> None:
    x, weight, bias = (values(rng, s) for s in ((0, 3), (2, 3), (2,)))
    leaves = [Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    apply("linear", *leaves).sum().backward()
    for leaf in leaves:
        np.testing.assert_array_equal(leaf.grad, np.zeros(leaf.shape))


def test_linear_refuses_mixed_dtypes() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(AutogradError, match=r"linear .*float64.*float32.*convert the input"):
        layer(np.zeros((1, 3)))


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (2, 0, 3), (2, 2, 2, 3)])
def test_linear_of_any_number_of_axes(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal(shape), rng.standard_normal((5, 3)), rng.standard_normal(5)
    np.testing.assert_allclose(apply("linear", x, w, b).data, x @ w.T + b, rtol=1e-12)
    check_gradients(lambda *a: apply("linear", *a), x, w, b)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4)])
def test_linear_refuses_another_number_of_inputs(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(AutogradError, match=r"linear .*expected an input of shape \(\.\.\., 3\)"):
        layer(np.ones(shape, np.float32))
