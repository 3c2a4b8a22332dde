"""grad, vjp, jvp and trace: derivatives of functions, and worked examples."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, functional, no_grad, tensor
from mpidl.autograd import Record, grad, jvp, recording, trace, vjp
from mpidl.errors import AutogradError
from tests.unit.draws import values

Rng = np.random.Generator


def test_the_square() -> None:
    assert grad(lambda x: x**2)(3.0) == 6
    value, change = jvp(lambda x: x**2, 3.0, 1.0)
    assert (value, change) == (9, 6)


def test_a_polynomial() -> None:
    """Z = 2 x^2 + 5 x has dz/dx = 4 x + 5."""
    z = lambda x: 2 * x**2 + 5 * x  # noqa: E731
    assert grad(z)(2.0) == 13
    assert jvp(z, 2.0, 1.0) == (18, 13)


def test_two_vectors() -> None:
    """Q = 3 a^3 - b^2 has dQ/da = 9 a^2 and dQ/db = -2 b."""
    a, b = np.array([2.0, 3.0]), np.array([6.0, 4.0])
    value, pull = vjp(lambda a, b: 3 * a**3 - b**2, a, b)
    np.testing.assert_array_equal(value, [-12, 65])
    to_a, to_b = pull(np.ones(2))
    np.testing.assert_allclose(to_a, [36, 81], rtol=1e-15)
    np.testing.assert_allclose(to_b, [-12, -8], rtol=1e-15)
    change = jvp(lambda a, b: 3 * a**3 - b**2, (a, b), (np.ones(2), np.ones(2)))[1]
    np.testing.assert_allclose(change, [24, 73], rtol=1e-15)


def test_a_product_of_a_sum() -> None:
    f = lambda x, y, z: (x + y) * z  # noqa: E731
    point = (-2.0, 5.0, -4.0)
    assert [grad(f, i)(*point) for i in range(3)] == [-4, -4, 3]
    assert [jvp(f, point, tuple(np.eye(3)[i]))[1] for i in range(3)] == [-4, -4, 3]


def test_a_neuron_of_two_inputs() -> None:
    """s = sigmoid(2 x0 - 3 x1 - 3) at (-1, -2): the sum is 1, and s' = s (1 - s) = 0.196612."""
    w, x = np.array([2.0, -3.0, -3.0]), np.array([-1.0, -2.0])
    value, pull = vjp(lambda w, x: functional.sigmoid(w[0] * x[0] + w[1] * x[1] + w[2]), w, x)
    s = 0.7310585786300049
    slope = 0.19661193324148185  # s (1 - s)
    np.testing.assert_allclose(value, s, rtol=1e-14)
    to_w, to_x = pull(np.ones(()))
    np.testing.assert_allclose(to_w, [-slope, -2 * slope, slope], rtol=1e-13)  # -0.197 -0.393 0.197
    np.testing.assert_allclose(to_x, [2 * slope, -3 * slope], rtol=1e-13)  # 0.393 -0.590


def test_one_argument_of_several(rng: Rng) -> None:
    x, y = values(rng, (3,)), values(rng, (3,))

    def function(a: Any, b: Any, names: list[str]) -> Tensor:
        assert names == ["left"]
        return (a * a * b).sum()

    np.testing.assert_allclose(grad(function)(x, y, ["left"]), 2 * x * y, rtol=1e-14)
    np.testing.assert_allclose(grad(function, 1)(x, Tensor(y).data, ["left"]), x * x, rtol=1e-14)


def test_the_jacobian_row_by_row_and_column_by_column(rng: Rng) -> None:
    a, x = values(rng, (3, 4)), values(rng, (4,))

    def function(t: Tensor) -> Tensor:
        return functional.tanh(a @ t)

    jacobian = (1 - np.tanh(a @ x) ** 2)[:, None] * a
    _, pull = vjp(function, x)
    np.testing.assert_allclose([pull(row) for row in np.eye(3)], jacobian, rtol=1e-11, atol=1e-14)
    columns = [jvp(function, x, column)[1] for column in np.eye(4)]
    np.testing.assert_allclose(np.transpose(columns), jacobian, rtol=1e-11, atol=1e-14)


def test_pull_can_be_called_again(rng: Rng) -> None:
    x = values(rng, (3,))
    _, pull = vjp(lambda t: t.exp() * t, x)
    first = pull(np.ones(3)).copy()
    np.testing.assert_array_equal(pull(np.ones(3)), first)
    np.testing.assert_allclose(pull(np.full(3, 2.0)), 2 * first, rtol=1e-14)
    np.testing.assert_array_equal(pull(np.zeros(3)), np.zeros(3))


def test_a_failed_pull_can_be_called_again(rng: Rng) -> None:
    x, fail = values(rng, (3,)), [True]
    _, pull = vjp(lambda t: failing(t * 2.0, fail) + t, x)
    with pytest.raises(RuntimeError, match="as asked"):
        pull(np.ones(3))
    fail.clear()
    np.testing.assert_array_equal(pull(np.ones(3)), np.full(3, 3.0))


def failing(x: Tensor, fail: list[bool]) -> Tensor:
    """Return `x`, through an operation whose adjoint fails as long as `fail` is not empty."""
    y = x * 1.0
    assert y.node is not None
    assert y.node.edges is not None
    (source, adjoint) = y.node.edges[0]

    def fails(g: Any, out: Any) -> Any:
        if fail:
            raise RuntimeError("as asked")
        return adjoint(g, out)

    y.node.edges[0] = (source, fails)
    return y


def test_other_leaves_gather_nothing(rng: Rng) -> None:
    weight = Tensor(values(rng, (4, 3)), requires_grad=True)
    bias = Tensor(values(rng, (4,)), requires_grad=True)
    bias.fill_grad()
    calls: list[Tensor] = []
    weight.on_gradient(calls.append)
    x = values(rng, (2, 3))
    found = grad(lambda t: functional.linear(t, weight, bias).sum())(x)
    np.testing.assert_allclose(found, np.tile(weight.data.sum(0), (2, 1)), rtol=1e-13, atol=1e-12)
    assert weight.grad is None
    np.testing.assert_array_equal(bias.grad, np.zeros(4))
    assert calls == []
    assert weight.uses == bias.uses == 0
    functional.linear(x, weight, bias).sum().backward()  # and later they do
    assert calls == [weight]


def test_an_argument_without_a_part_has_a_gradient_of_zeros() -> None:
    x, y = np.ones(3), np.ones((2, 2))
    to_x, to_y = vjp(lambda a, _: a * 2.0, x, y)[1](np.ones(3))
    np.testing.assert_array_equal(to_x, np.full(3, 2.0))
    np.testing.assert_array_equal(to_y, np.zeros((2, 2)))
    np.testing.assert_array_equal(vjp(lambda _: Tensor(np.ones(2)), x)[1](np.ones(2)), np.zeros(3))


def test_the_function_that_changes_nothing() -> None:
    x, g = np.arange(3.0), np.array([1.0, 5.0, 7.0])
    value, pull = vjp(lambda t: t, x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(pull(g), g)
    np.testing.assert_array_equal(jvp(lambda t: t, x, g), [x, g])


def test_jvp_of_what_ignores_its_input() -> None:
    value, change = jvp(lambda _: Tensor(np.array([2.0, 3.0])), np.ones(3), np.ones(3))
    np.testing.assert_array_equal(value, [2, 3])
    np.testing.assert_array_equal(change, [0, 0])
    _, change = jvp(lambda t: t.detach() * 2.0, np.ones(3), np.ones(3))
    np.testing.assert_array_equal(change, np.zeros(3))


@pytest.mark.parametrize("start", [0.5, 3.0])
def test_control_flow(start: float) -> None:
    def function(x: Tensor) -> Tensor:
        y, count = x, 0
        while y.item() < 10:
            y = y * x if x > 1 else y * 3.0
            count += 1
        return y + float(count)

    step = 1e-6
    numeric = (
        function(Tensor(np.array(start + step))).item()
        - function(Tensor(np.array(start - step))).item()
    ) / (2 * step)
    np.testing.assert_allclose(jvp(function, start, 1.0)[1], numeric, rtol=1e-7)
    np.testing.assert_allclose(grad(function)(start), numeric, rtol=1e-7)


def test_jvp_is_linear_in_the_direction(rng: Rng) -> None:
    x, v, w = (values(rng, (3,)) for _ in range(3))
    function = lambda t: functional.softmax(t * t)  # noqa: E731
    whole = jvp(function, x, 2 * v - w)[1]
    parts = 2 * jvp(function, x, v)[1] - jvp(function, x, w)[1]
    np.testing.assert_allclose(whole, parts, rtol=1e-10, atol=1e-14)


def test_jvp_keeps_no_graph_and_leaves_other_tensors_alone() -> None:
    weight = tensor([2.0, 3.0], requires_grad=True)
    results: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        assert not recording()
        results.append(x * weight)
        return results[0]

    _, change = jvp(function, np.ones(2, np.float32), np.ones(2, np.float32))
    np.testing.assert_array_equal(change, [2, 3])
    assert results[0].node is None
    assert weight.grad is None
    assert recording()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grad(lambda x: x * 2.0)(np.ones(3)), r"grad: .*shape \(3,\), not one number"),
        (lambda: vjp(lambda x: x * 2.0, np.ones(3))[1](np.ones(2)), r"vjp: .*\(2,\) for \(3,\)"),
        (lambda: jvp(lambda x: x, np.ones(3), np.ones(2)), r"jvp: .*\(3,\).*\(2,\)"),
        (lambda: jvp(lambda x, _: x, (1.0, 2.0), (1.0,)), r"jvp: a point of shapes \[\(\), \(\)\]"),
    ],
)
def test_wrong_shapes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(AutogradError, match=message):
        call()


def test_whole_numbers_become_float64() -> None:
    found = grad(lambda x: (x * x).sum())(np.array([1, 2, 3]))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [2, 4, 6])
    value, change = jvp(lambda x: x * x, np.array([3]), np.array([1]))
    assert (value.dtype, change.dtype) == (np.float64, np.float64)
    assert grad(lambda x: x * x)(3) == 6


def test_no_grad_inside_makes_constants() -> None:
    def function(x: Tensor) -> Tensor:
        with no_grad():
            scale = x * x
        return (scale * x).sum()

    np.testing.assert_array_equal(grad(function)(np.array([2.0, 3.0])), [4, 9])
    assert recording()


def test_modes_end_with_an_exception() -> None:
    def function(x: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        jvp(function, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="inside"), trace() as records:
        function(tensor(1.0))
    assert recording()
    assert type(tensor(1.0) * 2.0) is Tensor
    assert records == []


def test_trace_lists_operations_in_order() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    with trace() as records:
        y = x * 2.0
        z = y.sum(0)
    assert [r.name for r in records] == ["multiply", "sum"]
    assert records[0].inputs[0] is x
    assert records[0].inputs[1] == 2.0
    assert records[0].result is y
    assert records[1] == Record("sum", (y,), {"axis": 0, "keepdims": False}, z)
    z.backward()
    np.testing.assert_array_equal(x.grad, [2, 2])
    _ = x * 3.0
    assert len(records) == 2


def test_nested_traces_see_what_is_inside_each() -> None:
    x = tensor([1.0])
    with trace() as outer:
        _ = x + 1.0
        with trace() as inner, no_grad():
            _ = x * 2.0
        _ = -x
    assert [r.name for r in outer] == ["add", "multiply", "negative"]
    assert [r.name for r in inner] == ["multiply"]


def test_trace_and_jvp_in_each_other() -> None:
    function = lambda x: x * x + x  # noqa: E731
    with trace() as records:
        assert jvp(function, 3.0, 1.0) == (12, 7)
    assert [r.name for r in records] == ["multiply", "add"]

    def traced(x: Tensor) -> Tensor:
        with trace() as records:
            y = function(x)
        assert [r.name for r in records] == ["multiply", "add"]
        assert records[1].inputs[0] is records[0].result
        assert records[1].result is y
        return y

    assert jvp(traced, 3.0, 1.0) == (12, 7)


def test_grad_inside_grad_differentiates_its_own_variable() -> None:
    """The inner gradient is an array, and so a constant for the outer one."""
    outer = grad(lambda x: x * float(grad(lambda y: y * y)(x.item())))
    assert outer(3.0) == 6


def test_modes_are_of_one_thread(rng: Rng) -> None:
    found: list[Any] = []
    x = values(rng, (50,))

    def work() -> None:
        for _ in range(50):
            found.append(grad(lambda t: (t.exp() * t).sum())(x))
            found.append(jvp(lambda t: t.exp() * t, x, np.ones(50))[1])

    with trace() as records, no_grad():
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert records == []
    assert len(found) == 300
    for each in found:
        np.testing.assert_allclose(each, np.exp(x) * (1 + x), rtol=1e-12, atol=1e-12)


def test_a_tensor_as_an_argument(rng: Rng) -> None:
    """Its values count; it is not changed, and gathers nothing."""
    array = values(rng, (3,)).astype(np.float32)
    x = Tensor(array, requires_grad=True)
    np.testing.assert_allclose(grad(lambda t: (t * t).sum())(x), 2 * array, rtol=1e-6)
    value, pull = vjp(lambda t, u: t * u, x, Tensor(np.array([1, 2, 3])))
    np.testing.assert_allclose(value, array * [1, 2, 3], rtol=1e-6)
    to_x, to_u = pull(np.ones_like(value))
    assert (to_x.dtype, to_u.dtype) == (np.float32, np.float64)  # whole numbers become float64
    np.testing.assert_allclose(to_u, array, rtol=1e-6)
    np.testing.assert_array_equal(jvp(lambda t: t * 2.0, x, array)[1], 2 * array)
    assert x.grad is None


FUNCTIONS = [lambda t: t, lambda t: t.exp(), lambda t: t + 1.0, lambda t: t.reshape(t.shape).sum()]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3,), (), (2, 3)])
@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_what_is_pulled_back_is_an_array_of_the_arguments_dtype(
    function: Any, shape: tuple[int, ...], given: type
) -> None:
    x = np.ones(shape, np.float32)
    value, pull = vjp(function, x)
    found = pull(np.ones(value.shape, given))
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == (shape, np.float32)
    found[...] = 7  # it is the caller's
    np.testing.assert_array_equal(x, np.ones(shape))
