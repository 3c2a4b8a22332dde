"""The values of the operations against formulas in NumPy, and what happens at the edges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, functional, tensor
from mpidl.autograd import apply, check_gradients
from mpidl.errors import AutogradError
from tests.unit.draws import positive, shape, some_shape, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

erf = np.vectorize(math.erf, otypes=[float])

SINGLE: dict[str, tuple[dict[str, Any], Callable[[Array], Array]]] = {
    "abs": ({}, np.abs),
    "clip": ({"low": -0.5, "high": 0.7}, lambda x: np.minimum(np.maximum(x, -0.5), 0.7)),
    "cos": ({}, np.cos),
    "exp": ({}, np.exp),
    "gelu": ({"approximate": "none"}, lambda x: x * (1 + erf(x / math.sqrt(2))) / 2),
    "leaky_relu": ({"slope": 0.2}, lambda x: np.where(x > 0, x, 0.2 * x)),
    "negative": ({}, np.negative),
    "relu": ({}, lambda x: np.maximum(x, 0)),
    "sigmoid": ({}, lambda x: 1 / (1 + np.exp(-x))),
    "sin": ({}, np.sin),
    "tanh": ({}, np.tanh),
    "threshold": ({"threshold": 0.3, "value": -7.0}, lambda x: np.where(x > 0.3, x, -7)),
    "to": ({"device": "cpu"}, np.array),
    "astype": ({"dtype": np.float32}, lambda x: x.astype(np.float32)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_functions_of_single_elements(name: str, rng: np.random.Generator) -> None:
    options, reference = SINGLE[name]
    for _ in range(10):
        x = np.asarray(3 * values(rng, some_shape(rng)))
        found = apply(name, x, **options).data
        np.testing.assert_allclose(found, reference(x), rtol=1e-12, atol=1e-14)


def test_log_sqrt_and_power(rng: np.random.Generator) -> None:
    x, y = positive(rng, (4, 3)), values(rng, (3,))
    np.testing.assert_allclose(functional.log(x).data, np.log(x), rtol=1e-13)
    np.testing.assert_allclose(functional.sqrt(x).data, np.sqrt(x), rtol=1e-13)
    np.testing.assert_allclose((Tensor(x) ** y).data, x**y, rtol=1e-13)
    np.testing.assert_allclose((2.5 ** Tensor(y)).data, 2.5**y, rtol=1e-13)
    for n in (-2, -0.5, 0, 0.5, 1, 2, 3):
        np.testing.assert_allclose((Tensor(x) ** n).data, x**n, rtol=1e-13)


def test_softmax_and_its_logarithm(rng: np.random.Generator) -> None:
    x = values(rng, (3, 4, 5))
    for axis in (-1, 0, 1):
        exps = np.exp(x)
        expected = exps / exps.sum(axis, keepdims=True)
        np.testing.assert_allclose(
            functional.softmax(x, axis).data, expected, rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(
            functional.log_softmax(x, axis).data, np.log(expected), rtol=1e-12
        )


def test_shapes_and_indices(rng: np.random.Generator) -> None:
    x, y = values(rng, (2, 3)), values(rng, (2, 3))
    condition = x > y
    row, mask = np.array([1, -1, 1]), condition * 2.0
    cases = [
        (functional.reshape(x, (3, -1)), x.reshape(3, 2)),
        (functional.transpose(x), x.T),
        (functional.transpose(x[None], (1, -1, 0)), x[None].transpose(1, 2, 0)),
        (functional.broadcast_to(x, (4, 2, 3)), np.broadcast_to(x, (4, 2, 3))),
        (functional.concatenate([x, y, x], -1), np.concatenate([x, y, x], 1)),
        (functional.stack([x, y], -1), np.stack([x, y], -1)),
        (functional.stack([x, y]), np.array([x, y])),
        (functional.pad(x, [(1, 0), (2, 3)], 5.0), np.pad(x, [(1, 0), (2, 3)], constant_values=5)),
        (functional.where(condition, x, y), np.where(condition, x, y)),
        (functional.where(Tensor(condition), x, 2.0), np.where(condition, x, 2)),
        (functional.dropout(x, mask), x * mask),
        (Tensor(x)[row], x[row]),
        (Tensor(x)[condition], x[condition]),
        (Tensor(x)[Tensor(condition)], x[condition]),
        (Tensor(x)[..., Tensor(row)], x[..., row]),
        (functional.embedding(np.array([[1, 0], [1, 1]]), x), x[[[1, 0], [1, 1]]]),
        (functional.embedding(Tensor(np.array([1, 0])), x), x[::-1]),
    ]
    for found, expected in cases:
        np.testing.assert_array_equal(found.data, expected)


def test_losses(rng: np.random.Generator) -> None:
    x, t = values(rng, (5, 4)), rng.uniform(0.1, 0.9, (5, 4))
    s = 1 / (1 + np.exp(-x))
    for function, each in (
        (functional.mse, (x - t) ** 2),
        (functional.l1, np.abs(x - t)),
        (functional.binary_cross_entropy, -t * np.log(s) - (1 - t) * np.log(1 - s)),
    ):
        np.testing.assert_allclose(function(x, t).item(), each.mean(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            function(x, t, reduction="sum").item(), each.sum(), rtol=1e-12, atol=1e-12
        )
    np.testing.assert_allclose(functional.kl(x, t).item(), (t * (np.log(t) - x)).sum() / 5)
    labels = rng.integers(0, 4, 5)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    for smoothing in (0.0, 0.3):
        wanted = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
        found = functional.cross_entropy(x, labels, smoothing=smoothing).item()
        np.testing.assert_allclose(found, -(wanted * log_p).sum(1).mean(), rtol=1e-12, atol=1e-12)


def test_matmul_is_numpys(rng: np.random.Generator) -> None:
    for left, right in [
        ((2, 3), (3,)),
        ((3,), (3, 4)),
        ((2, 1, 4, 3), (5, 3, 2)),
        ((0, 3), (3, 2)),
    ]:
        x, y = values(rng, left), values(rng, right)
        np.testing.assert_allclose(functional.matmul(x, y).data, x @ y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("subscripts", ["fbdace", "Zaz", "b...a", "cb,dc", "fbd,ace", "fiie"])
def test_einsum_without_an_output_sorts_its_letters(
    subscripts: str, rng: np.random.Generator
) -> None:
    letters = subscripts.replace("...", "xy").split(",")
    lengths = dict(zip("abcdefixyzZ", (2, 3, 4, 1, 3, 2, 3, 2, 4, 2, 3), strict=True))
    arrays = [values(rng, tuple(lengths[c] for c in term)) for term in letters]
    found, expected = functional.einsum(subscripts, *arrays), np.einsum(subscripts, *arrays)
    np.testing.assert_allclose(found.data, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_var_divides_by_count_less_correction(correction: float, rng: np.random.Generator) -> None:
    x = values(rng, (3, 4)) + 100
    found = Tensor(x).var(1, correction=correction).data
    expected = ((x - x.mean(1, keepdims=True)) ** 2).sum(1) / (4 - correction)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2), -1])
@pytest.mark.parametrize("keepdims", [False, True])
def test_mean(axis: int | tuple[int, ...] | None, keepdims: bool, rng: np.random.Generator) -> None:
    x = values(rng, (2, 3, 4))
    expected = x.mean(axis, keepdims=keepdims)
    found = Tensor(x).mean(axis, keepdims=keepdims).data
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    check_gradients(lambda t: t.mean(axis, keepdims=keepdims), x)


def test_attention_of_a_query_that_may_look_at_nothing_is_0(rng: np.random.Generator) -> None:
    q, k, v = (Tensor(values(rng, (2, 3, 4)), requires_grad=True) for _ in range(3))
    mask = np.array([[True, False, True], [False, False, False], [False, True, False]])
    y = functional.attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(y.data[:, 1], 0)
    np.testing.assert_allclose(y.data[:, 2], v.data[:, 1], rtol=1e-12, atol=1e-12)
    y.sum().backward()
    np.testing.assert_array_equal(q.grad[:, 1], 0)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5), (5, 2)])
def test_causal_attention_ends_with_the_last_key(n: int, m: int, rng: np.random.Generator) -> None:
    q, k, v = (values(rng, s) for s in ((n, 4), (m, 4), (m, 4)))
    found = functional.attention(q, k, v, causal=True).data
    for i in range(n):
        seen = max(0, i + 1 + m - n)
        weights = np.exp(k[:seen] @ q[i] / 2)
        expected = weights @ v[:seen] / weights.sum() if seen else np.zeros(4)
        np.testing.assert_allclose(found[i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_attention_of_its_parts(causal: bool, rng: np.random.Generator) -> None:
    n, length, heads, each = 2, *shape(rng, 3)
    x = values(rng, (n, length, 3 * heads * each))
    q, k, v = np.moveaxis(x.reshape(n, length, 3, heads, each), (2, 3), (0, 2))
    mask = rng.integers(0, 2, (n, 1, length, length)).astype(bool)
    drop = rng.integers(0, 2, (n, heads, length, length)) * 2.0
    options: dict[str, Any] = {"mask": mask, "causal": causal, "drop": drop}
    expected = functional.attention(q, k, v, **options).data.swapaxes(1, 2)
    found = functional.self_attention(x, heads, **options).data
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "abs"])
def test_the_derivative_at_0_is_0(name: str) -> None:
    x = tensor([0.0, -0.0], requires_grad=True)
    apply(name, x).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_power_0_has_derivative_0_everywhere() -> None:
    for exponent in (0, 0.0, np.zeros(2, np.float32)):
        x = tensor([0.0, 1.0], requires_grad=True)
        (x**exponent).sum().backward()
        np.testing.assert_array_equal(x.grad, [0, 0])


def test_the_derivative_of_0_to_a_power_to_that_power_is_0() -> None:
    y = tensor([1.0, 2.0], requires_grad=True)
    (0.0**y).sum().backward()
    np.testing.assert_array_equal(y.grad, [0, 0])


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_equal_elements_share_the_derivative(name: str) -> None:
    x, y = (tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    apply(name, x, y).sum().backward()
    np.testing.assert_array_equal(x.grad, [0.5, 0.5])
    np.testing.assert_array_equal(y.grad, [0.5, 0.5])


@pytest.mark.parametrize("name", ["max", "min"])
def test_equal_extremes_share_the_derivative(name: str) -> None:
    x = tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 2.0]], requires_grad=True)
    apply(name, x, axis=1, keepdims=False).sum().backward()
    second = [0, 0.5, 0.5] if name == "max" else [1, 0, 0]
    np.testing.assert_allclose(x.grad, [[1 / 3] * 3, second], rtol=1e-6)


def test_of_equal_elements_in_a_window_one_gets_the_derivative() -> None:
    x = tensor(np.ones((1, 1, 4, 4)), requires_grad=True)
    functional.max_pool2d(x, 2).sum().backward()
    windows = x.grad.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    assert all(sorted(w) == [0, 0, 0, 1] for w in windows)


def test_clip_has_derivative_1_at_its_borders() -> None:
    x = tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    x.clip(-1, 1).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 1, 1, 1, 0])


def test_an_element_picked_often_gets_all_gradients(rng: np.random.Generator) -> None:
    keys = [np.array([1, 1, -2, 0]), [1, 1, -2, 0], (np.array([1, 1, -2, 0]),)]
    weights = values(rng, (4, 2))
    expected = np.array([weights[3], weights[:3].sum(0), np.zeros(2)])
    for key in keys:
        x = Tensor(np.zeros((3, 2)), requires_grad=True)
        x[key].backward(weights)
        np.testing.assert_allclose(x.grad, expected, rtol=1e-12, atol=1e-12)
    table = Tensor(np.zeros((3, 2)), requires_grad=True)
    functional.embedding(np.array([1, 1, 1, 0]), table).backward(weights)
    np.testing.assert_allclose(table.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_sigmoid_does_not_overflow(size: float) -> None:
    x = tensor([-size, size], requires_grad=True)
    y = functional.sigmoid(x)
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [0, 1])
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_what_is_stable_for_large_numbers() -> None:
    x = tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    np.testing.assert_array_equal(functional.softmax(x).data, [[1, 0, 0]])
    np.testing.assert_array_equal(functional.log_softmax(x).data, [[0, -2e4, -1e4]])
    assert functional.cross_entropy(x, np.array([1])).item() == 2e4
    target = np.array([[0.0, 0.0, 1.0]])
    loss = functional.binary_cross_entropy(x, target, reduction="sum")
    np.testing.assert_allclose(loss.item(), 1e4 + math.log(2), rtol=1e-6)
    loss.backward()
    np.testing.assert_array_equal(x.grad, [[1, 0, -0.5]])
    scores = functional.attention(x.data * 1e3, x.data * 1e3, np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(scores.data, [[1, 1]])


def test_kl_takes_0_log_0_as_0() -> None:
    x = tensor([[-1.0, -2.0]], requires_grad=True)
    loss = functional.kl(x, np.array([[0.0, 1.0]]))
    loss.backward()
    assert loss.item() == 2
    np.testing.assert_array_equal(x.grad, [[0, -1]])


@pytest.mark.parametrize("name", ["mse", "l1", "binary_cross_entropy", "kl"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_a_loss_of_nothing_is_0(name: str, shape: tuple[int, ...]) -> None:
    x = Tensor(np.zeros(shape, np.float32), requires_grad=True)
    result = apply(name, x, target=np.zeros(shape, np.float32))
    result.backward()
    assert result.item() == 0
    assert x.grad is not None
    assert x.grad.shape == shape


def test_cross_entropy_of_nothing_is_0() -> None:
    x = Tensor(np.zeros((0, 10), np.float32), requires_grad=True)
    result = functional.cross_entropy(x, np.zeros(0, np.int64), smoothing=0.1)
    result.backward()
    assert result.item() == 0
    assert x.grad is not None
    assert x.grad.shape == (0, 10)


def test_the_mean_of_nothing_is_0() -> None:
    x = Tensor(np.zeros((0, 3)), requires_grad=True)
    x.mean().backward()
    assert x.mean().item() == 0
    np.testing.assert_array_equal(x.mean(0).data, [0, 0, 0])


def test_no_samples_give_zero_gradients_to_weights(rng: np.random.Generator) -> None:
    cases: dict[str, list[tuple[int, ...]]] = {
        "linear": [(0, 3), (2, 3), (2,)],
        "conv2d": [(0, 3, 4, 4), (2, 3, 3, 3), (2,)],
        "layer_norm": [(0, 3), (3,), (3,)],
        "matmul": [(0, 3), (3, 2)],
    }
    for name, shapes in cases.items():
        leaves = [Tensor(values(rng, s), requires_grad=True) for s in shapes]
        options = {"eps": 1e-5} if name == "layer_norm" else {}
        apply(name, *leaves, **options).sum().backward()
        for leaf in leaves:
            np.testing.assert_array_equal(leaf.grad, np.zeros(leaf.shape))


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (2, 0, 3), (2, 2, 2, 3)])
def test_linear_of_any_number_of_axes(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal(shape), rng.standard_normal((5, 3)), rng.standard_normal(5)
    np.testing.assert_allclose(functional.linear(x, w, b).data, x @ w.T + b, rtol=1e-12, atol=1e-12)
    check_gradients(functional.linear, x, w, b)


@pytest.mark.parametrize("name", ["linear", "conv2d", "matmul"])
def test_products_refuse_mixed_dtypes(name: str) -> None:
    shape = (1, 1, 2, 2) if name == "conv2d" else (2, 2)
    with pytest.raises(AutogradError, match=rf"{name} .*float64.*float32: "):
        apply(name, np.ones(shape), np.ones(shape, np.float32))
