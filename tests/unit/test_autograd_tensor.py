"""What a tensor can do beside gradients: comparisons, numbers as text, methods, what it refuses."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, functional, tensor
from mpidl.autograd import check_gradients
from mpidl.errors import AutogradError
from tests.unit.draws import values

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array

COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
Rng = np.random.Generator


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda f: f.__name__)
def test_comparisons_are_of_elements(compare: Callable[..., Array], rng: Rng) -> None:
    x, y = rng.integers(0, 3, (2, 4, 3)).astype(np.float32)
    for other in (y, y[0], 1, np.float64(1)):
        found, expected = compare(Tensor(x), other), compare(x, other)
        assert isinstance(found, np.ndarray)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(compare(Tensor(x), tensor(other)), expected)
        if not isinstance(other, np.generic):  # as NumPy itself, it takes the operator over
            np.testing.assert_array_equal(compare(other, Tensor(x)), compare(other, x))


def test_tensors_are_keys_by_what_they_are() -> None:
    first, second = tensor([1.0, 2.0]), tensor([1.0, 2.0])
    names = {first: "first", second: "second"}
    assert (names[first], names[second]) == ("first", "second")
    assert first.detach() not in names
    assert len({first, second, first}) == 2
    first.data[0] = 5  # its values are no part of the key
    assert names[first] == "first"


def test_the_truth_of_one_number() -> None:
    assert tensor(2.0)
    assert tensor([[0.5]])
    assert not tensor([0.0])
    with pytest.raises(ValueError, match="ambiguous"):
        bool(tensor([0.0, 1.0]))


def test_a_number_as_text() -> None:
    loss = (tensor([1.0, 0.23456], requires_grad=True) * 1.0).sum()
    assert f"{loss:.3f}" == "1.235"
    assert f"{loss:8.1e}" == " 1.2e+00"
    assert f"{tensor(1.5)}" == "1.5"
    assert f"{tensor([1.5, 2.0])}" == "[1.5 2. ]"
    with pytest.raises(TypeError, match="format"):
        f"{tensor([1.5, 2.0]):.3f}"


def test_the_length_is_of_the_first_axis() -> None:
    assert len(tensor(np.ones((3, 2)))) == 3
    with pytest.raises(TypeError, match="unsized"):
        len(tensor(1.0))


METHODS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Array], Array]]] = {
    "swapaxes": (lambda x: x.swapaxes(0, 2), lambda x: x.swapaxes(0, 2)),
    "swapaxes from the end": (lambda x: x.swapaxes(-1, 1), lambda x: x.swapaxes(-1, 1)),
    "swapaxes with itself": (lambda x: x.swapaxes(1, 1), lambda x: x),
    "flatten": (lambda x: x.flatten(), lambda x: x.reshape(24)),
    "flatten from 1": (lambda x: x.flatten(1), lambda x: x.reshape(2, 12)),
    "flatten from the last": (lambda x: x.flatten(-1), lambda x: x),
    "relu": (lambda x: x.relu(), lambda x: np.maximum(x, 0)),
    "sigmoid": (lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (lambda x: x.tanh(), np.tanh),
    "softmax": (lambda x: x.softmax(), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    "softmax along 1": (
        lambda x: x.softmax(1),
        lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, rng: Rng) -> None:
    method, expected = METHODS[name]
    x = values(rng, (2, 3, 4))
    np.testing.assert_allclose(method(Tensor(x)).data, expected(x), rtol=1e-12, atol=1e-14)
    check_gradients(method, x)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_flatten_of_no_samples(start: int) -> None:
    x = tensor(np.ones((0, 3, 4)), requires_grad=True)
    y = x.flatten(start)
    assert y.shape == [(0,), (0, 12), (0, 3, 4)][start]
    y.sum().backward()
    assert x.grad.shape == (0, 3, 4)
    assert tensor(1.0).flatten().shape == (1,)


@pytest.mark.parametrize("axes", [(0, 2), (-3, 1)])
def test_swapaxes_refuses_an_axis_that_is_not_there(axes: tuple[int, int]) -> None:
    with pytest.raises(AutogradError, match=r"(swapaxes|transpose) of shapes"):
        tensor(np.ones((2, 3))).swapaxes(*axes)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_argmax_is_an_array_of_integers(axis: int | None, rng: Rng) -> None:
    x = values(rng, (3, 4))
    found = tensor(x, requires_grad=True).argmax(axis)
    np.testing.assert_array_equal(found, np.argmax(x, axis))
    assert np.asarray(found).dtype.kind == "i"


def test_a_classifier_counts_what_it_got_right(rng: Rng) -> None:
    logits, labels = values(rng, (6, 3)), rng.integers(0, 3, 6)
    right = Tensor(logits).argmax(1) == labels
    assert right.sum() == sum(
        row.argmax() == label for row, label in zip(logits, labels, strict=True)
    )


@pytest.mark.parametrize("data", [[1.0, 2.0], (1.0,), 1.0, None, "a"])
def test_a_tensor_is_made_of_an_array(data: Any) -> None:
    with pytest.raises(
        AutogradError, match=rf"Tensor of a {type(data).__name__}: use mpidl.tensor"
    ):
        Tensor(data)


def test_a_tensor_of_a_numpy_number_holds_an_array() -> None:
    x = Tensor(np.float32(2), requires_grad=True)
    assert isinstance(x.data, np.ndarray)
    functional.exp(x).backward()
    np.testing.assert_allclose(x.grad, np.exp(2), rtol=1e-6)
