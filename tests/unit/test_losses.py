"""Losses and metrics against their formulas."""

from __future__ import annotations

from collections.abc import Callable

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


def test_smoothing_spreads_a_share_over_all_classes(rng: np.random.Generator) -> None:
    n, classes, smoothing = 5, 4, float(rng.uniform(0, 1))
    logits, labels = rng.standard_normal((n, classes)), rng.integers(0, classes, n)
    target = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = nn.cross_entropy(Tensor(logits), labels, smoothing=smoothing)
    np.testing.assert_allclose(loss.data, -(target * log_softmax).sum(axis=1).mean(), rtol=1e-12)


def test_binary_cross_entropy_is_minus_the_log_likelihood(rng: np.random.Generator) -> None:
    x, t = rng.standard_normal((2, 3, 4)) * 2
    t = 1 / (1 + np.exp(-t))
    s = 1 / (1 + np.exp(-x))
    losses = -t * np.log(s) - (1 - t) * np.log(1 - s)
    given = Tensor(x, requires_grad=True)
    loss = nn.binary_cross_entropy(given, t)
    loss.backward()
    np.testing.assert_allclose(loss.data, losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(given.grad, (s - t) / x.size, rtol=1e-9, atol=1e-12)
    total = nn.binary_cross_entropy(Tensor(x), t, reduction="sum")
    np.testing.assert_allclose(total.data, losses.sum(), rtol=1e-12)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy_of_huge_logits(size: float, dtype: type) -> None:
    logits = np.array([size, size, -size, -size], dtype)
    x = Tensor(logits, requires_grad=True)
    loss = nn.binary_cross_entropy(x, np.array([1.0, 0, 1, 0]), reduction="sum")
    loss.backward()
    np.testing.assert_allclose(loss.data, 2 * size, rtol=1e-6)
    np.testing.assert_allclose(x.grad, [0, 1, -1, 0], atol=1e-6)


def test_kl_is_the_divergence_of_each_row(rng: np.random.Generator) -> None:
    p, q = rng.dirichlet(np.ones(5), (2, 3))
    p[0, 0] = 0
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0)
    np.testing.assert_allclose(nn.kl(Tensor(np.log(q)), p).data, terms.sum() / 3, rtol=1e-10)
    np.testing.assert_allclose(nn.kl(Tensor(np.log(q)), q).data, 0, atol=1e-12)


def test_sums_are_means_times_the_elements(rng: np.random.Generator) -> None:
    output, target = rng.standard_normal((2, 3, 4))
    for loss in (nn.mse, nn.l1, nn.binary_cross_entropy):
        x, y = Tensor(output, requires_grad=True), Tensor(output, requires_grad=True)
        total, mean = loss(x, target, reduction="sum"), loss(y, target)
        total.backward()
        mean.backward()
        np.testing.assert_allclose(total.data, mean.data * 12, rtol=1e-12)
        np.testing.assert_allclose(x.grad, y.grad * 12, rtol=1e-12)
        with pytest.raises(AutogradError, match="reduction='max': expected 'mean' or 'sum'"):
            loss(x, target, reduction="max")


def test_of_no_samples_every_loss_is_0() -> None:
    """A rank may have none; warnings are errors here."""
    none, target = np.zeros((0, 3)), np.zeros((0, 3))
    for loss in (nn.mse, nn.l1, nn.binary_cross_entropy, nn.kl):
        x = Tensor(none, requires_grad=True)
        value = loss(x, target)
        value.backward()
        assert value.item() == 0
        assert x.grad.shape == (0, 3)
    x = Tensor(none, requires_grad=True)
    nn.cross_entropy(x, np.zeros(0, int)).backward()
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("loss", [nn.mse, nn.l1, nn.binary_cross_entropy, nn.kl])
def test_losses_do_not_broadcast(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(AutogradError, match=r"expected a target of shape \(3, 1\), got \(3,\)"):
        loss(Tensor(np.zeros((3, 1))), np.zeros(3))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_is_a_share(smoothing: float) -> None:
    with pytest.raises(AutogradError, match=f"smoothing={smoothing}: expected 0 <= smoothing < 1"):
        nn.cross_entropy(Tensor(np.zeros((2, 3))), np.zeros(2, int), smoothing=smoothing)
