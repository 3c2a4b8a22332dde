"""Losses and metrics against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl import Tensor, nn
from mpidl.errors import AutogradError


def test_cross_entropy_is_minus_the_log_of_the_softmax(rng: np.random.Generator) -> None:
    n, classes = map(int, rng.integers(1, 9, 2))
    logits, labels = rng.standard_normal((n, classes)) * 3, rng.integers(0, classes, n)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    x = Tensor(logits, requires_grad=True)
    loss = nn.cross_entropy(x, labels)
    loss.backward()
    expected = np.mean([-np.log(softmax[i, labels[i]]) for i in range(n)])
    np.testing.assert_allclose(loss.data, expected, rtol=1e-10)
    np.testing.assert_allclose(
        x.grad, (softmax - np.eye(classes)[labels]) / n, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("size", [1e3, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_huge_logits_does_not_overflow(size: float, dtype: type) -> None:
    logits = np.array([[size, 0, -size], [-size, 0, size]], dtype)
    x = Tensor(logits, requires_grad=True)
    loss = nn.cross_entropy(x, np.array([0, 1]))
    loss.backward()
    np.testing.assert_allclose(loss.data, size / 2, rtol=1e-6)
    np.testing.assert_array_equal(x.grad, [[0, 0, 0], [0, -0.5, 0.5]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_keep_the_dtype(dtype: type) -> None:
    x = Tensor(np.ones((2, 3), dtype), requires_grad=True)
    target = np.zeros((2, 3))
    for loss in (nn.cross_entropy(x, np.array([0, 1])), nn.mse(x, target), nn.l1(x, target)):
        loss.backward()
        assert loss.dtype == dtype
        assert loss.shape == ()
        assert x.grad.dtype == dtype


def test_cross_entropy_changes_neither_logits_nor_labels(rng: np.random.Generator) -> None:
    logits, labels = rng.standard_normal((4, 3)), rng.integers(0, 3, 4)
    before = logits.copy(), labels.copy()
    nn.cross_entropy(Tensor(logits, requires_grad=True), labels).backward()
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_mse_and_l1(rng: np.random.Generator) -> None:
    output, target = rng.standard_normal((2, 3, 4))
    mse, l1 = nn.mse(Tensor(output), target), nn.l1(Tensor(output), target)
    np.testing.assert_allclose(mse.data, ((output - target) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(l1.data, np.abs(output - target).mean(), rtol=1e-12)


def test_mse_and_l1_take_whole_numbers_as_target() -> None:
    x = Tensor(np.array([1.5, 2.0], np.float32))
    assert nn.mse(x, np.array([1, 4])).item() == 2.125
    assert nn.l1(x, np.array([1, 4])).item() == 1.25


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = Tensor(np.array([[1.0, 2, 0], [5, 4, 3], [0, 0, 1], [9, 0, 0]]))
    assert nn.accuracy(logits, np.array([1, 0, 0, 0])) == 0.75
    assert nn.accuracy(Tensor(np.zeros((0, 3))), np.zeros(0, int)) == 0


@pytest.mark.parametrize(
    ("labels", "found"), [([0, 1], "list"), (np.zeros(2), "float64"), (np.zeros(2, bool), "bool")]
)
def test_labels_are_whole_numbers(labels: object, found: str) -> None:
    with pytest.raises(AutogradError, match=f"labels as an array of integers, got {found}"):
        nn.cross_entropy(Tensor(np.zeros((2, 3))), labels)  # type: ignore[arg-type]
