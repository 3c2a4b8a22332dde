"""Corners of the engine: what once went wrong in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, functional, no_grad
from mpidl.autograd import grad, jvp, vjp
from mpidl.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable


def leaf(*shape: int, dtype: Any = np.float64) -> Tensor:
    return Tensor(
        np.linspace(0.1, 1, int(np.prod(shape)), dtype=dtype).reshape(shape), requires_grad=True
    )


# -- arrays changed in place that are not noticed --------------------------------------------------


def test_a_changed_operand_of_einsum_is_found() -> None:
    x, y = leaf(2, 3), leaf(3, 2)
    loss = functional.einsum("ij,jk->ik", x, y).sum()
    x.data[0, 0] += 1
    with pytest.raises(AutogradError, match="changed in place"):
        loss.backward()


def test_a_changed_index_among_several_is_found() -> None:
    x, rows = leaf(2, 3), np.array([0, 1])
    loss = x[rows, rows].sum()
    rows[0] = 1
    with pytest.raises(AutogradError, match="changed in place"):
        loss.backward()


def test_a_changed_dropout_mask_of_attention_is_found() -> None:
    qkv, drop = [leaf(2, 3, 4) for _ in range(3)], np.ones((2, 3, 3))
    loss = functional.attention(*qkv, drop=drop).sum()
    drop[0, 0, 0] = 0
    with pytest.raises(AutogradError, match="changed in place"):
        loss.backward()


def test_a_function_that_sums_over_ranks_may_keep_what_it_likes() -> None:
    """Batch normalisation is given one: its buffers are no business of the engine."""
    buffer, x, ones = np.zeros(6), leaf(4, 3), np.ones(3)

    def total(values: Any) -> Any:
        buffer[:] = values
        return buffer.copy()

    y = functional.batch_norm(x, leaf(3), ones, mean=ones, var=ones, count=4, total=total)
    buffer[:] = 7
    y.sum().backward()


def test_an_input_of_a_batched_product_is_not_kept_for_its_shape() -> None:
    x = leaf(2, 4, 3)
    between = x * 1.0
    loss = (between @ np.ones((3, 2))).sum()
    between.data[...] = 0
    loss.backward()


# -- derivatives that are wrong or not there ------------------------------------------------------


def test_forward_mode_of_a_negative_base_to_fixed_powers() -> None:
    change = jvp(lambda x: x ** np.array([2.0, 3.0]), np.array([-1.0, -2.0]), np.ones(2))[1]
    np.testing.assert_allclose(change, [-2, 12])


def test_pull_of_attention_with_the_same_array_of_other_numbers() -> None:
    value, pull = vjp(functional.attention, *(leaf(3, 4).data for _ in range(3)))
    gradient = np.ones_like(value)
    first = pull(gradient)[2].copy()
    gradient *= 2
    np.testing.assert_allclose(pull(gradient)[2], 2 * first)


def test_grad_inside_no_grad() -> None:
    with no_grad():
        assert grad(lambda x: x * x)(3.0) == 6


def test_jvp_inside_jvp_tells_the_directions_apart() -> None:
    """d/dx [x d/dy (x + y)] = 1."""
    outer = jvp(lambda x: x * float(jvp(lambda y: x + y, 1.0, 1.0)[1]), 2.0, 1.0)
    assert outer[1] == 1


def test_einsum_stretches_an_axis_that_is_summed_away() -> None:
    x, y = leaf(3, 4), leaf(1, 4)
    functional.einsum("ij,ij->j", x.reshape(3, 4), y.reshape(1, 4)).sum().backward()
    np.testing.assert_allclose(x.grad, np.broadcast_to(y.data, (3, 4)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_short_integers_as_indices_of_many_rows(dtype: type) -> None:
    x = leaf(300)
    x[np.array([1, 2, 2], dtype)].sum().backward()
    np.testing.assert_array_equal(x.grad[:3], [0, 1, 2])


def test_a_gradient_from_pull_is_ones_own() -> None:
    _, pull = vjp(lambda x, y: x + y, np.ones(2), np.ones(2))
    given = np.ones(2)
    to_x, to_y = pull(given)
    assert not np.shares_memory(to_x, to_y)
    assert not np.shares_memory(to_x, given)


def test_a_gradient_of_a_large_sum_can_be_written_to() -> None:
    assert grad(lambda x: x.sum())(np.ones(10_000)).flags.writeable


# -- shapes that are taken, and fail later -------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (2, 4), ()])
def test_linear_refuses_a_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutogradError, match="linear"):
        functional.linear(leaf(2, 3), leaf(4, 3), leaf(*shape))


@pytest.mark.parametrize("shape", [(1,), ()])
def test_conv2d_refuses_a_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutogradError, match="conv2d"):
        functional.conv2d(leaf(1, 2, 4, 4), leaf(3, 2, 2, 2), leaf(*shape))


# -- numbers ---------------------------------------------------------------------------------------


def test_relu_of_minus_infinity_is_0() -> None:
    assert functional.relu(np.array([-np.inf])).data == 0


@pytest.mark.parametrize("function", [functional.mean, lambda x: functional.mse(x, x * 0)])
def test_a_mean_of_float16_is_not_infinite_where_its_sum_is(function: Any) -> None:
    x = np.full(1000, 100, np.float16)
    assert np.isfinite(function(x).item())


def test_gelu_of_large_float16_has_a_derivative() -> None:
    x = Tensor(np.array([300.0, -300.0], np.float16), requires_grad=True)
    functional.gelu(x, "tanh").sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: functional.clip(x, n, 1),
        lambda x, n: functional.var(x, correction=n),
        lambda x, n: functional.cross_entropy(x, np.zeros(2, int), smoothing=n),
    ],
)
def test_numpy_numbers_as_options_keep_float32(function: Any) -> None:
    assert function(leaf(2, 3, dtype=np.float32), np.float64(0.5)).dtype == np.float32


def test_a_truth_value_is_a_number() -> None:
    np.testing.assert_array_equal((leaf(2) * True).data, leaf(2).data)


@pytest.mark.parametrize("gradient", [2.0, [1.0, 1.0]])
def test_backward_says_what_a_gradient_is(gradient: Any) -> None:
    with pytest.raises(AutogradError, match="gradient"):
        (leaf(2) * 2.0).backward(gradient)


@pytest.mark.parametrize("x", [-15.0, -20.0, -80.0, 15.0])
def test_sigmoid_is_exact_in_its_tails(x: float) -> None:
    leaves = [Tensor(np.array([x], np.float32), requires_grad=True) for _ in range(2)]
    y = leaves[0].sigmoid()
    y.backward(np.ones(1, np.float32))
    leaves[1].sigmoid().log().backward(np.ones(1, np.float32))
    exact = 1 / (1 + math.exp(-x))
    np.testing.assert_allclose(y.data, exact, rtol=1e-6)
    np.testing.assert_allclose(leaves[0].grad, exact * (1 - exact), rtol=2e-6 if x < 0 else 0.2)
    np.testing.assert_allclose(leaves[1].grad, 1 - exact, rtol=1e-6, atol=1e-7)
    change = jvp(lambda t: t.sigmoid(), leaves[0].data, np.ones(1, np.float32))[1]
    np.testing.assert_array_equal(change, leaves[0].grad)


@pytest.mark.parametrize(("x", "target"), [(-20.0, 0.0), (-80.0, 0.0), (-20.0, 0.25), (20.0, 1.0)])
def test_binary_cross_entropy_is_exact_in_its_tails(x: float, target: float) -> None:
    logit = Tensor(np.array([x], np.float32), requires_grad=True)
    loss = functional.binary_cross_entropy(logit, np.array([target], np.float32))
    loss.backward()
    expected = max(x, 0) - x * target + math.log1p(math.exp(-abs(x)))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6, atol=1e-45 if x < 0 else 1e-8)
    np.testing.assert_allclose(
        logit.grad, [1 / (1 + math.exp(-x)) - target], rtol=1e-6, atol=0 if x < 0 else 1e-7
    )


@pytest.mark.parametrize("x", [1e4, -1e4])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_binary_cross_entropy_of_large_logits(x: float, target: float) -> None:
    logit = Tensor(np.array([x], np.float32), requires_grad=True)
    loss = functional.binary_cross_entropy(logit, np.array([target], np.float32))
    loss.backward()
    assert loss.item() == (1e4 if (x > 0) != bool(target) else 0)
    np.testing.assert_array_equal(logit.grad, [float(x > 0) - target])


# -- where nothing passes, infinity does not either -----------------------------------------------

#: each chooses what is above 0 of four numbers of the first axis, or the largest of them
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "clip": lambda x: x.clip(0.0),
    "clip on both sides": lambda x: x.clip(0.0, 9.0),
    "maximum": lambda x: functional.maximum(x, 0.0),
    "maximum of an array": lambda x: functional.maximum(np.zeros((), x.dtype), x),
    "threshold": lambda x: functional.threshold(x, 0.0, 0.0),
}
DTYPES = [np.float16, np.float32, np.float64]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", GATES)
def test_an_infinite_gradient_does_not_pass_a_closed_gate(
    name: str, dtype: type, size: int, channels_last: bool, rng: np.random.Generator
) -> None:
    """Of the square root, whose derivative at 0 is infinite; 40 x 40 takes the way in blocks."""
    values = rng.uniform(-2, 2, (2, 2, size, size)).astype(dtype)
    if channels_last:
        values = values.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    x = Tensor(values, requires_grad=True)
    y = functional.sqrt(GATES[name](x))
    with np.errstate(divide="ignore"):  # nothing else is to be warned of
        y.sum().backward()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(values > 0, 0.5 / np.sqrt(np.where(values > 0, values, 1)), 0)
    np.testing.assert_allclose(x.grad, expected, rtol=4e-3 if dtype is np.float16 else 1e-5)
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("gradient", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", GATES)
def test_a_single_number_passes_no_gradient_through_a_closed_gate(
    name: str, gradient: float
) -> None:
    for shape in ((), (1,), (2, 1)):
        x = Tensor(np.full(shape, -1.0), requires_grad=True)
        GATES[name](x).backward(np.full(shape, gradient))
        np.testing.assert_array_equal(x.grad, np.zeros(shape))


@pytest.mark.parametrize("gradient", [np.inf, -np.inf, np.nan])
def test_an_open_gate_passes_what_comes(gradient: float) -> None:
    for name in GATES:
        x = Tensor(np.array([1.0, -1.0, 2.0]), requires_grad=True)
        GATES[name](x).backward(np.array([gradient, gradient, 3.0]))
        np.testing.assert_array_equal(x.grad, [gradient, 0, 3])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gradient", [np.inf, np.nan])
def test_an_extreme_takes_an_infinite_gradient_alone(sign: float, gradient: float) -> None:
    x = Tensor(sign * np.array([[-1.0, 0.0, 0.0], [1.0, 2.0, 0.0]]), requires_grad=True)
    function = functional.max if sign > 0 else functional.min
    function(x, 1).backward(np.array([gradient, 1.0]))
    np.testing.assert_array_equal(x.grad, [[0, gradient, gradient], [0, 1, 0]])


@pytest.mark.parametrize("gradient", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("stride", [2, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_window_passes_an_infinite_gradient_to_one_element(
    gradient: float, place: int, stride: int, channels_last: bool
) -> None:
    values = np.zeros((1, 3, 2, 2))
    values[:, 1].flat[place] = 1
    values[:, [0, 2], 0, 0] = 1
    if channels_last:
        values = values.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    x = Tensor(values, requires_grad=True)
    y = functional.max_pool2d(x, 2, stride=stride)
    y.backward(np.array([1.0, gradient, 2.0]).reshape(y.shape))
    expected = values * np.array([1, 0, 2]).reshape(3, 1, 1)
    expected[:, 1].flat[place] = gradient
    np.testing.assert_array_equal(x.grad, expected)


@pytest.mark.parametrize("odd", [lambda x: x.view(np.matrix), np.ma.masked_array])
def test_arrays_whose_products_are_others_become_plain(odd, rng: np.random.Generator) -> None:
    """The product of two np.matrix is a matrix product: gradients would be wrong, or fail."""
    x = rng.standard_normal((3, 3)).astype(np.float32)
    y = Tensor(x.copy(), requires_grad=True)
    (functional.exp(Tensor(odd(x.copy()))) * y * odd(x.copy())).sum().backward()
    np.testing.assert_allclose(y.grad, np.exp(x) * x, rtol=1e-6)
