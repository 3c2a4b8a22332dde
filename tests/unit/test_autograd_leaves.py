"""Leaves: where their gradients live, hooks, dtypes; and what errors say."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mpidl import Tensor, nn, tensor
from mpidl.array import aligned_zeros
from mpidl.autograd import OPS
from tests.unit.operations import values

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv]


def address(array: Array) -> int:
    return array.ctypes.data


def places(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return memory for values and gradient, cut out of larger arrays as a bucket does it."""
    size = int(np.prod(shape))
    return tuple(aligned_zeros(size + 5, np.float32)[3 : 3 + size].reshape(shape) for _ in range(2))


def test_bind_moves_the_values() -> None:
    w = tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    data, grad = places((2, 2))
    w.bind(data, grad)
    assert w.data is data
    np.testing.assert_array_equal(data, [[1, 2], [3, 4]])
    assert w.grad is None


def test_bind_moves_a_gradient_that_is_there() -> None:
    w = tensor([1.0, 2.0], requires_grad=True)
    (w * 3.0).sum().backward()
    data, grad = places((2,))
    w.bind(data, grad)
    assert w.grad is grad
    np.testing.assert_array_equal(grad, [3, 3])


def test_gradients_are_born_in_the_bound_memory(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 3)).astype(np.float32)
    layer, free = nn.Linear(3, 2), nn.Linear(3, 2)
    bound = {name: places(p.shape) for name, p in layer.named_parameters().items()}
    for name, p in layer.named_parameters().items():
        free.named_parameters()[name].data[...] = p.data
        p.bind(*bound[name])
    for times in (1, 2):  # the second backward adds, in the same memory
        nn.mse(layer(x), np.zeros((5, 2))).backward()
        nn.mse(free(x), np.zeros((5, 2))).backward()
        for name, p in layer.named_parameters().items():
            data, grad = bound[name]
            assert (address(p.data), address(p.grad)) == (address(data), address(grad)), times
            assert np.shares_memory(p.grad, grad)
            np.testing.assert_array_equal(grad, free.named_parameters()[name].grad)


def test_the_adjoints_of_linear_write_into_the_offered_memory(rng: np.random.Generator) -> None:
    leaves = [values(rng, s) for s in ((4, 3), (2, 3), (2,))]
    value, adjoints = OPS["linear"](*leaves)
    for leaf, adjoint in zip(leaves, adjoints, strict=True):
        out = np.empty_like(leaf)
        assert adjoint(np.ones_like(value), out) is out


def test_zero_grad_keeps_the_memory() -> None:
    w = tensor([1.0, 2.0], requires_grad=True)
    w.bind(*places((2,)))
    (w * 2.0).sum().backward()
    first = address(w.grad)
    w.zero_grad()
    assert w.grad is None
    (w * 5.0).sum().backward()
    assert address(w.grad) == first
    np.testing.assert_array_equal(w.grad, [5, 5])


@pytest.mark.parametrize("bound", [False, True])
def test_fill_grad_gives_zeros(bound: bool) -> None:
    w = tensor([1.0, 2.0], requires_grad=True)
    data, grad = places((2,))
    grad[...] = 7
    if bound:
        w.bind(data, grad)
    w.fill_grad()
    np.testing.assert_array_equal(w.grad, [0, 0])
    assert w.grad.dtype == np.float32
    assert np.shares_memory(w.grad, grad) == bound


def test_a_hook_fires_once_per_backward_when_the_gradient_is_complete() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    seen: list[Array] = []
    x.on_gradient(lambda leaf: seen.append(leaf.grad.copy()))
    for _ in range(2):
        (x * 2.0 + x * x * 0.0 + x.sum()).sum().backward()  # 2 + 0 + 2
    np.testing.assert_array_equal(seen, [[4, 4], [8, 8]])


def test_hooks_fire_in_the_order_in_which_backward_makes_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    order: list[str] = []
    for name, p in model.named_parameters().items():
        p.on_gradient(lambda _, name=name: order.append(name[0]))
    model(np.ones((1, 3), np.float32)).sum().backward()
    assert order == ["2", "2", "1", "1", "0", "0"]


def test_a_hook_of_a_leaf_that_is_itself_the_root() -> None:
    x = tensor(1.0, requires_grad=True)
    seen: list[Tensor] = []
    x.on_gradient(seen.append)
    x.backward()
    assert seen == [x]
    assert float(x.grad) == 1


@pytest.mark.parametrize("op", [*ARITHMETIC, operator.pow], ids=lambda f: f.__name__)
@pytest.mark.parametrize("number", [2, 2.5])
def test_python_numbers_keep_float32(op: Callable[..., Tensor], number: float) -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    y = op(x, number)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(y.data, op(np.array([1.0, 2.0]), number), rtol=1e-6)


@pytest.mark.parametrize("op", ARITHMETIC, ids=lambda f: f.__name__)
def test_python_numbers_on_the_left(op: Callable[..., Tensor]) -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    y = op(3.0, x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(y.data, op(3.0, np.array([1.0, 2.0])), rtol=1e-6)


@pytest.mark.parametrize("op", [*ARITHMETIC, operator.matmul], ids=lambda f: f.__name__)
def test_a_numpy_array_on_the_left(op: Callable[..., Tensor], rng: np.random.Generator) -> None:
    a, b = values(rng, (3, 3)), values(rng, (3, 3))
    y = op(a, Tensor(b, requires_grad=True))
    assert isinstance(y, Tensor)
    assert y.requires_grad
    np.testing.assert_allclose(y.data, op(a, b), rtol=1e-12)


def test_sums_and_means_keep_float32() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    assert (x.sum().dtype, x.mean().dtype) == (np.float32, np.float32)


def test_tensor_makes_float32_of_python_floats_and_keeps_arrays() -> None:
    assert tensor([1.0, 2.0]).dtype == np.float32
    assert tensor([1, 2]).dtype == np.int64
    assert tensor([1, 2], requires_grad=True).dtype == np.float32
    assert tensor(np.ones(2)).dtype == np.float64
    assert tensor(np.ones(2), dtype=np.float32).dtype == np.float32


def test_whole_numbers_in_an_array_that_are_to_have_a_gradient_become_float32() -> None:
    x = tensor(np.array([1, 2]), requires_grad=True)
    (x * 0.5).sum().backward()
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.grad, [0.5, 0.5])


def test_tensor_copies_its_array() -> None:
    mine = np.ones(2, np.float32)
    assert not np.shares_memory(tensor(mine).data, mine)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_only_element_becomes_a_number(shape: tuple[int, ...]) -> None:
    x = tensor(np.full(shape, 2.5))
    assert x.item() == 2.5
    assert float(x) == 2.5
