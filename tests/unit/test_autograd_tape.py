"""The graph: how gradients walk back through it, and when it ends."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, functional, nn, no_grad, tensor
from mpidl.autograd import apply, check_gradients, recording
from mpidl.errors import AutogradError
from tests.unit.draws import values

DEPTH = 100_000  # far beyond Python's limit of recursion


def chain(x: Tensor) -> Tensor:
    for _ in range(DEPTH):
        x = x + 1.0
    return x


def test_a_product_of_a_sum() -> None:
    x, y, z = (tensor(v, requires_grad=True) for v in (-2.0, 5.0, -4.0))
    f = (x + y) * z
    f.backward()
    assert f.item() == -12
    assert [float(t.grad) for t in (x, y, z)] == [-4, -4, 3]


def test_a_polynomial() -> None:
    x = tensor(2.0, requires_grad=True)
    (2 * x**2 + 5 * x).backward()
    assert float(x.grad) == 13


def test_two_vectors() -> None:
    """Q = 3 a^3 - b^2 has dQ/da = 9 a^2 and dQ/db = -2 b."""
    a, b = tensor([2.0, 3.0], requires_grad=True), tensor([6.0, 4.0], requires_grad=True)
    (3 * a**3 - b**2).backward(np.ones(2, np.float32))
    np.testing.assert_allclose(a.grad, 9 * a.data**2)
    np.testing.assert_allclose(b.grad, -2 * b.data)


def test_the_square() -> None:
    x = tensor(3.0, requires_grad=True)
    (x**2).backward()
    assert float(x.grad) == 6


def test_a_neuron_of_two_inputs() -> None:
    """s = sigmoid(1) = 0.731059, and s (1 - s) = 0.196612 times the inputs and the weights."""
    w = tensor([2.0, -3.0, -3.0], requires_grad=True)
    x = tensor([-1.0, -2.0], requires_grad=True)
    s = functional.sigmoid((w[:2] * x).sum() + w[2])
    s.backward()
    np.testing.assert_allclose(s.data, 0.731059, atol=1e-6)
    np.testing.assert_allclose(w.grad, [-0.196612, -0.393224, 0.196612], atol=1e-6)
    np.testing.assert_allclose(x.grad, [0.393224, -0.589836], atol=1e-6)


def test_a_deep_chain_goes_forward_and_backward() -> None:
    x = Tensor(np.zeros(2), requires_grad=True)
    y = chain(x)
    np.testing.assert_array_equal(y.data, [DEPTH, DEPTH])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_a_deep_chain_can_be_dropped_without_backward() -> None:
    y = chain(Tensor(np.zeros(2), requires_grad=True))
    end = weakref.ref(y)
    del y
    gc.collect()
    assert end() is None


def test_backward_lets_go_of_what_is_between() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    between = x * 2
    loss = between.sum()
    gone = weakref.ref(between)
    del between
    loss.backward()
    assert gone() is None


def test_a_diamond(rng: np.random.Generator) -> None:
    def diamond(x: Tensor) -> Tensor:
        top = x * x
        left, right = apply("tanh", top), top * 3.0
        return left * right + top

    check_gradients(diamond, values(rng, (3, 2)))


def test_a_ladder_of_diamonds_takes_each_node_once() -> None:
    """2^60 paths lead from the end to the leaf; a walk along paths would not end."""
    x = Tensor(np.array(1.0), requires_grad=True)
    y = x
    for _ in range(60):
        y = y * 0.5 + y * 0.5
    y.backward()
    np.testing.assert_allclose(x.grad, 1, rtol=1e-12)


def test_a_leaf_used_often(rng: np.random.Generator) -> None:
    check_gradients(lambda x: x * x + x @ x.T @ x + x, values(rng, (3, 3)))


def test_a_matrix_times_itself(rng: np.random.Generator) -> None:
    check_gradients(lambda x: x @ x, values(rng, (4, 4)))


def test_sharing_a_gradient_between_inputs_changes_neither() -> None:
    """The adjoint of a sum hands the same array to both inputs; later terms must not add to it."""
    x, y = (tensor([1.0, 1.0], requires_grad=True) for _ in range(2))
    a, b = x * 1.0, y * 1.0
    (a + b + a).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])
    np.testing.assert_array_equal(y.grad, [1, 1])


def test_backward_leaves_the_given_gradient_alone() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    given = np.ones(2, np.float32)
    (x + x).backward(given)
    x.backward(given)
    np.testing.assert_array_equal(x.grad, [3, 3])
    np.testing.assert_array_equal(given, [1, 1])


def test_gradients_add_up_over_two_backwards(rng: np.random.Generator) -> None:
    x = Tensor(values(rng, (3,)), requires_grad=True)
    (x * 2.0).sum().backward()
    (x * 3.0).sum().backward()
    np.testing.assert_allclose(x.grad, np.full(3, 5.0), rtol=1e-12)
    x.zero_grad()
    assert x.grad is None
    (x * 4.0).sum().backward()
    np.testing.assert_allclose(x.grad, np.full(3, 4.0), rtol=1e-12)


def test_a_failing_adjoint_leaves_the_counts_as_they_were() -> None:
    """What leaves received before stays; later backwards, also of other graphs, run as ever."""
    x, calls = Tensor(np.ones(2), requires_grad=True), []
    x.on_gradient(calls.append)
    y = x * 2.0
    broken = y * 3.0 + x
    node = broken.node.edges[0][0]
    source = node.edges[0][0]

    def fails(g: np.ndarray, out: object) -> np.ndarray:
        raise RuntimeError("as asked")

    node.edges[0] = (source, fails)
    with pytest.raises(RuntimeError, match="as asked"):
        broken.sum().backward()
    assert (x.uses, y.node.uses, y.node.gradient, node.gradient) == (0, 0, None, None)
    assert calls == []
    x.zero_grad()
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])
    assert calls == [x]


def test_a_failing_hook_leaves_the_counts_as_they_were() -> None:
    x, y = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))

    def fails(_: Tensor) -> None:
        raise RuntimeError("as asked")

    removes = [t.on_gradient(fails) for t in (x, y)]
    with pytest.raises(RuntimeError, match="as asked"):
        (x * 2.0 + y * 2.0 + x).sum().backward()
    assert x.uses == y.uses == 0
    for leaf, remove in zip((x, y), removes, strict=True):
        remove()
        leaf.zero_grad()
    (x * 2.0 + y).sum().backward()
    np.testing.assert_array_equal([x.grad, y.grad], [[2, 2], [1, 1]])


def test_a_part_that_is_freed_stops_the_walk_before_it_starts() -> None:
    x, y = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    shared = x * x
    shared.sum().backward()
    whole = (y * 2.0 + shared).sum()
    for _ in range(2):
        with pytest.raises(AutogradError, match="backward through multiply: an earlier backward"):
            whole.backward()
        assert y.grad is None
        assert x.uses == y.uses == whole.node.uses == 0


def test_a_hook_may_run_a_backward_of_its_own() -> None:
    x, y = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    x.on_gradient(lambda _: (y * y).sum().backward())
    (x * 2.0 + y).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])
    np.testing.assert_array_equal(y.grad, [3, 3])


def test_each_thread_walks_its_own_graph() -> None:
    leaves = [Tensor(np.full(3, float(i)), requires_grad=True) for i in range(4)]

    def work(leaf: Tensor) -> None:
        for _ in range(200):
            (leaf * leaf + leaf).sum().backward()

    threads = [threading.Thread(target=work, args=(leaf,)) for leaf in leaves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, leaf in enumerate(leaves):
        np.testing.assert_allclose(leaf.grad, np.full(3, 200 * (2 * i + 1)))


def test_no_grad_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), no_grad():
        raise RuntimeError("inside")
    assert recording()


def test_no_grad_nested() -> None:
    x = tensor(1.0, requires_grad=True)
    with no_grad():
        with no_grad():
            assert not recording()
        assert not recording()
        assert not (x * 2).requires_grad
    assert recording()
    assert (x * 2).requires_grad


def test_no_grad_is_of_one_thread() -> None:
    seen: list[bool] = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(recording()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_detach_cuts_the_graph_and_shares_memory() -> None:
    x = tensor(3.0, requires_grad=True)
    y = x * x
    (y.detach() * x).backward()
    assert float(x.grad) == 9
    assert np.shares_memory(y.detach().data, y.data)
    assert not y.detach().requires_grad


def test_a_model_in_no_grad_records_nothing() -> None:
    with no_grad():
        assert nn.Linear(2, 3)(np.ones((1, 2), np.float32)).node is None


def test_a_tensor_can_be_iterated_and_unpacked() -> None:
    leaf = Tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    first, _, third = leaf
    (first * 2 + third).sum().backward()
    np.testing.assert_array_equal(leaf.grad, [[2, 2], [0, 0], [1, 1]])
    assert [row.shape for row in leaf] == [(2,)] * 3


def test_a_tensor_becomes_numpy_only_when_asked() -> None:
    with pytest.raises(TypeError, match=r"tensor\.numpy\(\)"):
        np.asarray(Tensor(np.zeros(2)))


def test_a_gradient_hook_can_be_removed() -> None:
    calls: list[int] = []
    leaf = Tensor(np.ones(2), requires_grad=True)
    remove = leaf.on_gradient(lambda _: calls.append(1))
    leaf.sum().backward()
    remove()
    leaf.sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("left", [True, False])
def test_a_hook_may_change_its_parameter_beside_another_gradient(left: bool) -> None:
    """An optimizer in a hook: the gradient that needs the old values is computed before."""
    w, x = (tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    w.on_gradient(lambda leaf: leaf.data.fill(100))
    between = x * 1.0
    (w * between if left else between * w).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 3])
    np.testing.assert_array_equal(w.grad, [2, 3])
    np.testing.assert_array_equal(w.data, [100, 100])


def test_a_walk_waits_for_one_that_meets_the_same_leaf() -> None:
    """Else the second would find the first one's counts of uses, and call no hook."""
    w, calls = tensor([1.0, 2.0], requires_grad=True), []
    w.on_gradient(calls.append)
    inside, done = threading.Event(), threading.Event()
    first = w * 1.0
    assert first.node is not None
    assert first.node.edges is not None
    ((source, adjoint),) = first.node.edges

    def slow(gradient: Any, out: Any) -> Any:
        inside.set()
        done.wait(0.2)  # for what must not happen before the end of this walk
        return adjoint(gradient, out)

    first.node.edges = [(source, slow)]
    walks = [threading.Thread(target=first.sum().backward)]
    walks.append(threading.Thread(target=lambda: ((w * 2.0).sum().backward(), done.set())))
    walks[0].start()
    assert inside.wait(60)
    walks[1].start()
    for walk in walks:
        walk.join()
    np.testing.assert_array_equal(w.grad, [3, 3])
    assert calls == [w, w]
    assert w.uses == 0


def test_threads_add_up_the_gradients_of_a_shared_leaf() -> None:
    rounds, w, calls = 200, tensor(np.zeros(4, np.float64), requires_grad=True), []
    w.on_gradient(lambda _: calls.append(None))

    def work(factor: float) -> None:
        for _ in range(rounds):
            (w * factor + w).sum().backward()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1.0, 2.0, 4.0)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    np.testing.assert_array_equal(w.grad, np.full(4, 10.0 * rounds))
    assert len(calls) == 3 * rounds
