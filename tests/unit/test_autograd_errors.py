"""What the engine says when it is used wrongly, and its checker of a wrong adjoint."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl import functional, tensor
from mpidl.autograd import OPS, apply, check_gradients
from mpidl.errors import AutogradError, GradientMismatch


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: a((2, 3)) @ a((2, 3)), r"matmul of shapes \(2, 3\), \(2, 3\)"),
        (lambda a: a((2, 3)) @ a((2,)), r"matmul of shapes \(2, 3\), \(2,\)"),
        (lambda a: a(()) @ a((3,)), r"matmul of shapes \(\), \(3,\): expected arrays of one axis"),
        (lambda a: a((2, 3)) + a((4,)), r"add of shapes \(2, 3\), \(4,\)"),
        (lambda a: a((2, 3)) - a((3, 2)), r"subtract of shapes \(2, 3\), \(3, 2\)"),
        (lambda a: a((2,)) * a((3,)), r"multiply of shapes \(2,\), \(3,\)"),
        (lambda a: np.ones(2) / a((3,)), r"divide of shapes \(2,\), \(3,\)"),
        (lambda a: a((2, 3)).reshape(4, -1), r"reshape of shapes \(2, 3\)"),
        (lambda a: a((2, 3))[2], r"getitem of shapes \(2, 3\): index 2 is out of bounds"),
        (lambda a: a((2, 3)).sum(2), r"sum of shapes \(2, 3\): axis 2"),
        (lambda a: apply("linear", a((2, 3)), a((4, 5))), r"linear of shapes \(2, 3\), \(4, 5\)"),
        (
            lambda a: functional.mse(a((2, 1)), np.ones(2)),
            r"mse .*target of shape \(2, 1\), got \(2,\)",
        ),
        (lambda a: functional.l1(a((2,)), np.ones(())), r"l1 .*target of shape \(2,\), got \(\)"),
        (
            lambda a: functional.cross_entropy(a((2, 3)), np.zeros(3, int)),
            r"cross_entropy .*labels \(3,\)",
        ),
        (
            lambda a: functional.cross_entropy(a((2, 3)), np.array([0, 3])),
            "labels from 0 to 3 for 3 class",
        ),
        (
            lambda a: functional.cross_entropy(a((2, 3)), np.array([-1, 0])),
            "labels from -1 to 0 for 3 cla",
        ),
        (
            lambda a: functional.cross_entropy(a((2, 3)), np.zeros(2)),
            "cross_entropy .*integers, got float64",
        ),
        (
            lambda a: functional.cross_entropy(a((2, 3)), [0, 1]),
            "cross_entropy .*integers, got list",
        ),
        (
            lambda a: functional.cross_entropy(a((2,)), np.zeros(2, int)),
            r"expected logits \(n, classes\)",
        ),
        (
            lambda a: functional.cross_entropy(a((1, 3)), np.zeros(1, int), smoothing=1),
            "0 <= smoothing < 1",
        ),
        (
            lambda a: functional.mse(a((2,)), np.ones(2), reduction="none"),
            "'none': expected 'mean' or",
        ),
        (lambda a: functional.kl(a((2,)), np.ones(3)), r"kl .*target of shape \(2,\), got \(3,\)"),
        (
            lambda a: functional.binary_cross_entropy(a((2,)), np.ones(3)),
            "binary_cross_entropy .*target of",
        ),
        (
            lambda a: functional.embedding(np.array([3]), a((3, 2))),
            r"embedding .*from 3 to 3 for 3 rows",
        ),
        (lambda a: functional.embedding(np.array([-1]), a((3, 2))), "indices from -1 to -1"),
        (
            lambda a: functional.embedding(np.array([0.5]), a((3, 2))),
            "embedding .*array of integers",
        ),
        (lambda a: functional.embedding([0], a((3, 2))), "embedding .*array of integers"),
        (
            lambda a: functional.conv2d(a((1, 3, 4, 4)), a((2, 2, 3, 3))),
            r"conv2d of shapes \(1, 3, 4, 4\)",
        ),
        (lambda a: functional.conv2d(a((3, 4, 4)), a((2, 3, 3, 3))), r"expected x \(n, c, h, w\)"),
        (
            lambda a: functional.conv2d(a((1, 4, 4, 4)), a((3, 2, 3, 3)), groups=2),
            "3 output channels in 2",
        ),
        (
            lambda a: functional.conv2d(a((1, 3, 2, 9)), a((1, 3, 3, 3))),
            r"window of \(3, 3\) does not fit",
        ),
        (
            lambda a: functional.conv2d(a((1, 3, 4, 4)), a((2, 3, 1, 1)), stride=0),
            "stride=0: expected .*1 or",
        ),
        (
            lambda a: functional.conv2d(a((1, 3, 4, 4)), a((2, 3, 1, 1)), padding=-1),
            "padding=-1: .*0 or more",
        ),
        (
            lambda a: functional.conv2d(a((1, 3, 4, 4)), a((2, 3, 1, 1)), dilation=(1, 2, 3)),
            "one or two whole",
        ),
        (lambda a: functional.max_pool2d(a((1, 2, 4, 4)), 2, padding=2), "padding=.*at most half"),
        (lambda a: functional.max_pool2d(a((4, 4)), 2), "max_pool2d .*expected x"),
        (
            lambda a: functional.avg_pool2d(a((1, 2, 3, 3)), 4),
            r"avg_pool2d .*window of \(4, 4\) does not",
        ),
        (
            lambda a: functional.layer_norm(a((2, 3)), a((4,)), a((4,))),
            r"layer_norm .*expected x \(\.\.\., 4\)",
        ),
        (
            lambda a: functional.batch_norm(
                a((2, 3)), *[a((4,))] * 2, mean=np.ones(4), var=np.ones(4)
            ),
            r"batch_norm .*expected x \(n, channels, \.\.\.\)",
        ),
        (
            lambda a: functional.attention(a((2, 3)), a((2, 4)), a((2, 3))),
            r"attention .*expected q \(\.\.\., n",
        ),
        (
            lambda a: functional.attention(a((2, 2, 3)), *[a((2, 3))] * 2),
            "attention .*same leading axes",
        ),
        (
            lambda a: functional.self_attention(a((2, 3, 8)), 2),
            "self_attention .*multiple of 2 heads",
        ),
        (lambda a: functional.einsum("ij,jk->ik", a((2, 3))), "einsum .*names 2 inputs, got 1"),
        (
            lambda a: functional.einsum("ij->i", a((2, 3, 4))),
            r"einsum .*'ij' .*does not fit the shape \(2, 3",
        ),
        (
            lambda a: functional.einsum("ij,jk->ik", a((2, 3)), a((4, 5))),
            r"einsum of shapes \(2, 3\), \(4, 5",
        ),
        (lambda a: functional.pad(a((2, 3)), [(1, 1)]), "pad .*expected 2 pairs"),
        (lambda a: functional.pad(a((2,)), [(1, -1)]), "pad .*0 or more"),
        (lambda a: functional.clip(a((2,))), "clip .*expected low, high or both"),
        (lambda a: functional.gelu(a((2,)), "fast"), "gelu .*'fast': expected 'none' or 'tanh'"),
        (
            lambda a: functional.var(a((1, 3)), 0, correction=1),
            "var .*1 elements, and correction=1",
        ),
        (lambda a: functional.max(a((0, 3)), 0), r"max of shapes \(0, 3\)"),
        (
            lambda a: functional.concatenate([a((2, 3)), a((2, 2))]),
            r"concatenate of shapes \(2, 3\), \(2, 2\)",
        ),
        (lambda a: functional.stack([a((2,)), a((3,))]), r"stack of shapes \(2,\), \(3,\)"),
        (lambda a: functional.broadcast_to(a((2,)), (3,)), r"broadcast of shapes \(2,\)"),
        (lambda a: functional.transpose(a((2, 3)), (0, 0)), r"transpose of shapes \(2, 3\)"),
        (
            lambda a: functional.where(np.ones(3, bool), a((2,)), 0.0),
            r"where of shapes \(2,\), 0.0",
        ),
        (lambda a: functional.dropout(a((2,)), np.ones(3)), r"dropout of shapes \(2,\)"),
        (lambda a: functional.maximum(a((2,)), a((3,))), r"maximum of shapes \(2,\), \(3,\)"),
        (lambda a: functional.dropout(a((2,)), 0.5), r"dropout .*got 0.5; nn.Dropout\(p\) draws"),
        (lambda a: a((2, 3)).transpose(0), r"transpose of .*\(0,\): expected 2 .*swapaxes\(i, j\)"),
        (lambda a: a((2,)).astype(int), "astype .*dtype <class 'int'>: expected a floating one"),
        (lambda a: a((2,)).astype(np.bool_), "astype .*expected a floating one"),
        (lambda a: a((2,)) + None, r"add of shapes \(2,\), None: unsupported operand"),
        (lambda a: a((2,)) * "a", r"multiply of shapes \(2,\), a: "),
        (lambda a: a((2,)) @ 2.0, r"matmul of shapes \(2,\), 2.0: "),
        (lambda a: a((2,)).sum("a"), r"sum of shapes \(2,\): 'str'"),
        (lambda a: a((2,)).softmax("a"), r"softmax of shapes \(2,\): "),
        (lambda a: a((2,)).reshape("a"), r"reshape of shapes \(2,\): "),
        (lambda a: functional.linear(a((2,)), None), r"linear of shapes \(2,\), None: "),
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
    with pytest.raises(AutogradError, match=r"gradient of shape \(3, 2\): expected .* \(2, 3\)"):
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

        value, (adjoint_x, adjoint_y), push = right(x, y)
        return value, (adjoint_x, adjoint), push

    monkeypatch.setitem(OPS, "multiply", wrong)
    x, y = np.full((2, 3), 0.25), np.full((2, 3), 0.5)
    with pytest.raises(
        GradientMismatch, match=r"reverse mode, argument 1, element \(1, 2\): .*error 3"
    ):
        check_gradients(lambda a, b: a * b, x, y)


def test_check_gradients_counts_nan_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "exp", lambda x: (np.exp(x), (lambda g, _: g * np.nan,), np.exp))
    with pytest.raises(GradientMismatch, match=r"argument 0, element \(0,\): gradient nan"):
        check_gradients(lambda x: x.exp(), np.ones(1))


@pytest.mark.parametrize("factor", [1.01, -1.0, np.nan, np.ones((2, 1, 1))])
def test_check_gradients_looks_at_forward_mode(factor, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x):
        value, adjoints, push = right(x)
        return value, adjoints, lambda v: push(v) * factor

    right = OPS["exp"]
    monkeypatch.setitem(OPS, "exp", wrong)
    message = "argument 0, element" if np.isscalar(factor) else r"shape \(2, 1, 2\) of .*\(1, 2\)"
    with pytest.raises(GradientMismatch, match=f"forward mode, .*{message}"):
        check_gradients(lambda x: x.exp(), np.ones((1, 2)))


def test_check_gradients_tries_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradientMismatch, match="reverse mode, argument 1"):
        check_gradients(lambda x, y: x * y.detach(), np.ones(2), np.ones(2))
    right = OPS["multiply"]

    def wrong(x, y):
        value, adjoints, push = right(x, y)
        return value, adjoints, lambda vx, vy: push(vx, vy * 2)

    monkeypatch.setitem(OPS, "multiply", wrong)
    with pytest.raises(GradientMismatch, match="forward mode, argument 1"):
        check_gradients(lambda x, y: x * y, np.ones(2), np.ones(2))


def test_check_gradients_leaves_its_arrays_alone() -> None:
    x = np.linspace(1, 2, 6).reshape(2, 3)
    before = x.copy()
    check_gradients(lambda t: t.log(), x)
    np.testing.assert_array_equal(x, before)
    check_gradients(lambda t: t * t, np.array([1, 2, 3]))  # whole numbers become float64
