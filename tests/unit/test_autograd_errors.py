"""What the engine says when it is used wrongly, and its checker of a wrong adjoint."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl import nn, tensor
from mpidl.autograd import OPS, apply, check_gradients
from mpidl.errors import AutogradError, GradientMismatch


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: a((2, 3)) @ a((2, 3)), r"matmul of shapes \(2, 3\), \(2, 3\)"),
        (lambda a: a((2, 3)) @ a((3,)), r"matmul of shapes \(2, 3\), \(3,\): expected two 2-D"),
        (lambda a: a((2, 3)) + a((4,)), r"add of shapes \(2, 3\), \(4,\)"),
        (lambda a: a((2, 3)) - a((3, 2)), r"subtract of shapes \(2, 3\), \(3, 2\)"),
        (lambda a: a((2,)) * a((3,)), r"multiply of shapes \(2,\), \(3,\)"),
        (lambda a: np.ones(2) / a((3,)), r"divide of shapes \(2,\), \(3,\)"),
        (lambda a: a((2, 3)).reshape(4, -1), r"reshape of shapes \(2, 3\)"),
        (lambda a: a((2, 3))[2], r"getitem of shapes \(2, 3\): index 2 is out of bounds"),
        (lambda a: a((2, 3)).sum(2), r"sum of shapes \(2, 3\): axis 2"),
        (lambda a: apply("linear", a((2, 3)), a((4, 5))), r"linear of shapes \(2, 3\), \(4, 5\)"),
        (lambda a: nn.mse(a((2, 1)), np.ones(2)), r"mse .*target of shape \(2, 1\), got \(2,\)"),
        (lambda a: nn.l1(a((2,)), np.ones(())), r"l1 .*target of shape \(2,\), got \(\)"),
        (lambda a: nn.cross_entropy(a((2, 3)), np.zeros(3, int)), r"cross_entropy .*labels \(3,\)"),
        (lambda a: nn.cross_entropy(a((2, 3)), np.array([0, 3])), "labels from 0 to 3 for 3 class"),
        (lambda a: nn.cross_entropy(a((2, 3)), np.array([-1, 0])), "labels from -1 to 0 for 3 cla"),
    ],
)
def test_an_error_names_the_operation_and_the_shapes(function, message: str) -> None:
    with pytest.raises(AutogradError, match=message):
        function(lambda shape: tensor(np.ones(shape), requires_grad=True))


def test_backward_of_many_elements_says_what_to_pass() -> None:
    x = tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(
        AutogradError, match=r"shape \(2, 3\): pass a gradient of that shape, or sum"
    ):
        (x * 2).backward()


def test_backward_refuses_a_gradient_of_another_shape() -> None:
    x = tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(AutogradError, match=r"gradient of shape \(3, 2\) for \(2, 3\)"):
        (x * 2).backward(np.ones((3, 2)))


def test_backward_of_a_constant_is_refused() -> None:
    with pytest.raises(AutogradError, match="depends on nothing that requires a gradient"):
        tensor(1.0).backward()


def test_a_second_backward_names_the_operation() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    loss = x.exp().sum()
    loss.backward()
    with pytest.raises(AutogradError, match=r"backward through sum: .*run the forward pass again"):
        loss.backward()


def test_two_losses_of_one_graph_cannot_both_go_back() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    shared = x.exp()
    first, second = shared.sum(), (shared * 2).sum()
    first.backward()
    before = x.grad.copy()
    with pytest.raises(AutogradError, match="backward through exp"):
        second.backward()
    np.testing.assert_array_equal(x.grad, before)


def test_check_gradients_names_the_worst_element(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["multiply"]

    def wrong(x, y):
        def adjoint(g, out):
            result = adjoint_y(g, out)
            result[0, 1] += 0.5
            result[1, 2] += 3.0
            return result

        value, (adjoint_x, adjoint_y) = right(x, y)
        return value, (adjoint_x, adjoint)

    monkeypatch.setitem(OPS, "multiply", wrong)
    x, y = np.full((2, 3), 0.25), np.full((2, 3), 0.5)
    with pytest.raises(GradientMismatch, match=r"argument 1, element \(1, 2\): gradient .*error 3"):
        check_gradients(lambda a, b: a * b, x, y)


def test_check_gradients_counts_nan_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "exp", lambda x: (np.exp(x), (lambda g, _: g * np.nan,)))
    with pytest.raises(GradientMismatch, match=r"argument 0, element \(0,\): gradient nan"):
        check_gradients(lambda x: x.exp(), np.ones(1))
