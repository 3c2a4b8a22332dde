"""Corners of the engine: what once went wrong in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, functional, no_grad
from mpidl.autograd import grad, jvp, vjp
from mpidl.errors import AutogradError


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
