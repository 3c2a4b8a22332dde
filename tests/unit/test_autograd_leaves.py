"""Leaves: where their gradients live, and hooks."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mpidl import Tensor, functional, nn, tensor
from mpidl.array import aligned_zeros
from mpidl.autograd import OPS
from mpidl.errors import AutogradError
from tests.unit.draws import values

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


def test_bind_takes_the_values_that_are_there() -> None:
    w = tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    data, grad = places((2, 2))
    data[...] = [[5, 6], [7, 8]]
    w.bind(data, grad)
    assert w.data is data
    np.testing.assert_array_equal(data, [[5, 6], [7, 8]])
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
        bound[name][0][...] = p.data
        p.bind(*bound[name])
    for times in (1, 2):  # the second backward adds, in the same memory
        functional.mse(layer(x), np.zeros((5, 2))).backward()
        functional.mse(free(x), np.zeros((5, 2))).backward()
        for name, p in layer.named_parameters().items():
            data, grad = bound[name]
            assert (address(p.data), address(p.grad)) == (address(data), address(grad)), times
            assert np.shares_memory(p.grad, grad)
            np.testing.assert_array_equal(grad, free.named_parameters()[name].grad)


def test_the_adjoints_of_linear_write_into_the_offered_memory(rng: np.random.Generator) -> None:
    leaves = [values(rng, s) for s in ((4, 3), (2, 3), (2,))]
    value, adjoints, _ = OPS["linear"](*leaves)
    for leaf, adjoint in zip(leaves[1:], adjoints[1:], strict=True):
        out = np.empty_like(leaf)
        assert adjoint(np.ones_like(value), out) is out
        np.testing.assert_array_equal(out, adjoint(np.ones_like(value), None))


@pytest.mark.parametrize("name", ["matmul", "embedding"])
def test_more_adjoints_write_into_the_offered_memory(name: str, rng: np.random.Generator) -> None:
    weight = values(rng, (3, 2))
    if name == "matmul":
        value, adjoints, _ = OPS[name](values(rng, (4, 3)), weight)
    else:
        value, adjoints, _ = OPS[name](weight, indices=np.array([2, 0, 2]))
    out, gradient = np.full_like(weight, 7), values(rng, value.shape)
    assert adjoints[-1](gradient, out) is out
    np.testing.assert_array_equal(out, adjoints[-1](gradient, None))


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


@pytest.mark.parametrize("op", [*ARITHMETIC, operator.matmul], ids=lambda f: f.__name__)
def test_a_numpy_array_on_the_left(op: Callable[..., Tensor], rng: np.random.Generator) -> None:
    a, b = values(rng, (3, 3)), values(rng, (3, 3))
    y = op(a, Tensor(b, requires_grad=True))
    assert isinstance(y, Tensor)
    assert y.requires_grad
    np.testing.assert_allclose(y.data, op(a, b), rtol=1e-12, atol=1e-12)


def test_tensor_copies_its_array() -> None:
    mine = np.ones(2, np.float32)
    assert not np.shares_memory(tensor(mine).data, mine)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_only_element_becomes_a_number(shape: tuple[int, ...]) -> None:
    x = tensor(np.full(shape, 2.5))
    assert x.item() == 2.5
    assert float(x) == 2.5


def test_a_gradient_is_in_memory_of_its_own() -> None:
    """Where an adjoint returns its input, or a view that repeats one number."""
    given = np.ones(5000)
    x, y = (Tensor(np.ones(5000), requires_grad=True) for _ in range(2))
    (x + y).backward(given)
    x.sum().backward()
    x.grad[...] *= 2.0
    np.testing.assert_array_equal(x.grad, np.full(5000, 4.0))
    np.testing.assert_array_equal(y.grad, given)
    np.testing.assert_array_equal(given, np.ones(5000))
    assert x.grad.flags.writeable
    assert not np.shares_memory(x.grad, y.grad)


def test_requires_grad_can_be_set_and_taken_back() -> None:
    x = tensor([1.0, 2.0])
    assert not x.requires_grad
    x.requires_grad = True
    (x * 3.0).sum().backward()
    x.requires_grad = True  # as it is: the gradient stays
    np.testing.assert_array_equal(x.grad, [3, 3])
    x.requires_grad = False
    assert x.grad is None
    assert not (x * 2.0).requires_grad
    x.requires_grad = True
    assert x.grad is None


def test_requires_grad_of_a_result_cannot_be_set() -> None:
    y = tensor([1.0], requires_grad=True) * 2.0
    for value in (False, True):
        with pytest.raises(AutogradError, match=r"requires_grad: .*detach\(\)"):
            y.requires_grad = value
    assert y.requires_grad


def test_a_leaf_that_no_longer_requires_a_gradient_gets_none() -> None:
    x, y = (tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    calls: list[Tensor] = []
    x.on_gradient(calls.append)
    loss = (x * y).sum()
    x.requires_grad = False
    loss.backward()
    assert x.grad is None
    assert calls == []
    np.testing.assert_array_equal(y.grad, [1, 2])


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.fill_grad(),
        lambda t: t.on_gradient(print),
        lambda t: t.bind(np.zeros(2), np.zeros(2)),
    ],
)
def test_only_a_leaf_gathers_a_gradient(call: Callable[[Tensor], None]) -> None:
    for each in (tensor([1.0, 2.0]), tensor([1.0, 2.0], requires_grad=True) * 2.0):
        assert each.grad is None
        each.zero_grad()  # nothing to forget
        with pytest.raises(AutogradError, match="only a leaf with requires_grad=True"):
            call(each)


def test_the_same_hook_twice_fires_twice_and_goes_one_by_one() -> None:
    x, calls = tensor(1.0, requires_grad=True), []
    first, second = x.on_gradient(calls.append), x.on_gradient(calls.append)
    for remove, expected in ((lambda: None, 2), (first, 3), (first, 4), (second, 4)):
        remove()
        (x * 1.0).backward()
        assert len(calls) == expected


def test_data_of_another_shape_gets_a_gradient_of_that_shape() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    x.sum().backward()
    x.zero_grad()
    x.data = np.ones((3, 1), np.float32)
    x.sum().backward()
    np.testing.assert_array_equal(x.grad, np.ones((3, 1)))


def test_what_a_tensor_shows() -> None:
    x = tensor([1.0], requires_grad=True)
    assert repr(x) == "Tensor(array([1.], dtype=float32), requires_grad=True)"
    assert repr(tensor([1.0])) == "Tensor(array([1.], dtype=float32))"
    assert x.numpy() is x.data


def test_a_leaf_that_was_frozen_is_the_leaf_it_was() -> None:
    """Its memory may be a bucket's and its hooks a trainer's: both outlast a freeze."""
    w, (data, grad) = tensor([1.0, 2.0], requires_grad=True), places((2,))
    w.bind(data, grad)
    calls: list[Array] = []
    remove = w.on_gradient(lambda leaf: calls.append(leaf.grad.copy()))
    (w * 3.0).sum().backward()
    w.requires_grad = False
    w.requires_grad = False  # as it is
    assert w.grad is None
    w.requires_grad = True
    assert w.grad is None  # forgotten, not brought back
    (w * 5.0).sum().backward()
    assert w.grad is grad
    assert w.data is data
    np.testing.assert_array_equal(grad, [5, 5])
    np.testing.assert_array_equal(calls, [[3, 3], [5, 5]])
    remove()
    (w * 1.0).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_drop_grad_forgets_the_memory_too(frozen: bool) -> None:
    w, (data, grad) = tensor([1.0, 2.0], requires_grad=True), places((2,))
    w.bind(data, grad)
    calls: list[Tensor] = []
    w.on_gradient(calls.append)
    (w * 3.0).sum().backward()
    w.requires_grad = not frozen
    w.drop_grad()
    assert w.grad is None
    w.data, w.requires_grad = np.ones(2), True
    (w * 5.0).sum().backward()
    assert not np.shares_memory(w.grad, grad)
    assert w.grad.dtype == np.float64  # as the new values are
    np.testing.assert_array_equal(grad, [3, 3])
    np.testing.assert_array_equal(w.grad, [5, 5])
    assert len(calls) == 2
    tensor([1.0]).drop_grad()  # nothing to forget


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, complex])
def test_only_floats_can_have_a_gradient(dtype: type) -> None:
    message = f"requires_grad of {np.dtype(dtype)}: expected a float dtype"
    with pytest.raises(AutogradError, match=message):
        Tensor(np.ones(2, dtype), requires_grad=True)
    x = Tensor(np.ones(2, dtype))
    with pytest.raises(AutogradError, match=message):
        x.requires_grad = True
    assert not x.requires_grad
