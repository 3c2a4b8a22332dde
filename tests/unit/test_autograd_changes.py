"""Arrays that are changed in place between forward and backward, and which arrays are kept."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import Tensor, functional, no_grad, tensor
from mpidl.autograd import apply, vjp
from mpidl.errors import AutogradError
from tests.unit.draws import positive, values

if TYPE_CHECKING:
    from collections.abc import Callable

    Rng = np.random.Generator

#: the operation, the shapes of its inputs, its options, and which inputs the adjoints need
NEEDED: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], tuple[int, ...]]] = {
    "abs": ([(3, 4)], {}, (0,)),
    "attention": ([(2, 3, 4)] * 3, {}, (0, 1, 2)),
    "batch_norm": ([(4, 3), (3,), (3,)], {"eps": 1e-5}, (0,)),
    "conv2d": ([(1, 3, 5, 5), (4, 3, 2, 2), (4,)], {}, (0, 1)),
    "cos": ([(3, 4)], {}, (0,)),
    "divide": ([(3, 4), (3, 4)], {}, (1,)),
    "layer_norm": ([(4, 3), (3,), (3,)], {"eps": 1e-5}, (1,)),
    "linear": ([(4, 3), (2, 3), (2,)], {}, (0, 1)),
    "log": ([(3, 4)], {}, (0,)),
    "matmul": ([(4, 3), (3, 2)], {}, (0, 1)),
    "matmul of a vector": ([(4, 3), (3,)], {}, (0, 1)),
    "matmul of many": ([(2, 4, 3), (3, 2)], {}, (0, 1)),
    "multiply": ([(3, 4), (3, 4)], {}, (0, 1)),
    "multiply broadcast": ([(3, 4), (4,)], {}, (0, 1)),
    "power": ([(3, 4), (4,)], {}, (0, 1)),
    "self_attention": ([(2, 3, 6)], {"heads": 2}, (0,)),
    "sin": ([(3, 4)], {}, (0,)),
}
FREE: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "add": ([(3, 4), (4,)], {}),
    "subtract": ([(3, 4), (4,)], {}),
    "negative": ([(3, 4)], {}),
    "relu": ([(3, 4)], {}),
    "leaky_relu": ([(3, 4)], {"slope": 0.1}),
    "gelu": ([(3, 4)], {"approximate": "none"}),
    "threshold": ([(3, 4)], {"threshold": 0.5, "value": 0.0}),
    "clip": ([(3, 4)], {"low": 0.5, "high": None}),
    "exp": ([(3, 4)], {}),
    "tanh": ([(3, 4)], {}),
    "sigmoid": ([(3, 4)], {}),
    "sqrt": ([(3, 4)], {}),
    "softmax": ([(3, 4)], {"axis": -1}),
    "log_softmax": ([(3, 4)], {"axis": -1}),
    "sum": ([(3, 4)], {"axis": 0, "keepdims": False}),
    "mean": ([(3, 4)], {"axis": 0, "keepdims": False}),
    "var": ([(3, 4)], {"axis": 0, "keepdims": False, "correction": 0}),
    "max": ([(3, 4)], {"axis": 0, "keepdims": False}),
    "maximum": ([(3, 4), (3, 4)], {}),
    "mse": ([(3, 4)], {"target": np.ones((3, 4))}),
    "max_pool2d": ([(2, 3, 4, 4)], {"size": 2}),
    "avg_pool2d": ([(2, 3, 4, 4)], {"size": 2}),
    "concatenate": ([(3, 4), (2, 4)], {"axis": 0}),
    "stack": ([(3, 4), (3, 4)], {"axis": 0}),
    "pad": ([(3, 4)], {"widths": [(1, 0), (0, 2)], "value": 0.0}),
    "astype": ([(3, 4)], {"dtype": np.float32}),
}


def made(name: str, shapes: list[tuple[int, ...]], options: dict[str, Any], rng: Rng) -> Any:
    """Return leaves, the arrays between them and the operation, and the loss."""
    leaves = [Tensor(positive(rng, s), requires_grad=True) for s in shapes]
    between = [leaf * 1.0 for leaf in leaves]
    if name == "batch_norm":
        mean, var = values(rng, (3,)), positive(rng, (3,))
        options = {**options, "mean": mean, "var": var}
    return leaves, [t.data for t in between], apply(name.split()[0], *between, **options).sum()


@pytest.mark.parametrize(("name", "number"), [(n, i) for n in NEEDED for i in NEEDED[n][2]])
def test_a_changed_input_is_found_before_any_leaf_gets_a_gradient(
    name: str, number: int, rng: Rng
) -> None:
    leaves, between, loss = made(name, *NEEDED[name][:2], rng)
    leaves[-1].fill_grad()
    changed = between[number]
    changed[tuple(int(rng.integers(n)) for n in changed.shape)] += 1
    with pytest.raises(
        AutogradError, match=f"backward through {name.split()[0]}: .*changed in place"
    ) as error:
        loss.backward()
    kept = (8, 3) if name == "matmul of many" else changed.shape  # its rows, in one matrix
    assert (
        str(kept if number == 0 else changed.shape) in str(error.value) or name == "self_attention"
    )
    np.testing.assert_array_equal(leaves[-1].grad, np.zeros(leaves[-1].shape))
    assert all(leaf.grad is None for leaf in leaves[:-1])


@pytest.mark.parametrize("name", FREE)
def test_an_input_that_no_adjoint_needs_may_be_changed(name: str, rng: Rng) -> None:
    seed = int(rng.integers(2**32))
    found = []
    for change in (False, True):
        leaves, between, loss = made(name, *FREE[name], np.random.default_rng(seed))
        for array in between if change else ():
            array[...] = np.nan
        loss.backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "sqrt", "softmax", "log_softmax"])
def test_a_changed_result_is_found(name: str, rng: Rng) -> None:
    x = Tensor(positive(rng, (3, 4)), requires_grad=True)
    y = apply(name, x, **FREE[name][1])
    loss = (y + 1.0).sum()
    y.data[1, 2] *= 0.5
    with pytest.raises(AutogradError, match=f"backward through {name}"):
        loss.backward()
    assert x.grad is None


def test_a_changed_array_outside_the_graph_is_found(rng: Rng) -> None:
    constant, x = values(rng, (3,)), Tensor(values(rng, (3,)), requires_grad=True)
    loss = (x * constant).sum()
    constant[0] = 7
    with pytest.raises(AutogradError, match="backward through multiply"):
        loss.backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, i: functional.cross_entropy(x, i),
        lambda x, i: functional.embedding(i, x).sum(),
        lambda x, i: x[i].sum(),
        lambda x, i: functional.kl(x, np.ones((3, 3))) + x[i].sum(),
    ],
    ids=["cross_entropy", "embedding", "getitem", "with others"],
)
def test_changed_labels_and_indices_are_found(loss: Callable[..., Tensor]) -> None:
    x, indices = Tensor(np.ones((3, 3)), requires_grad=True), np.array([0, 1, 2])
    result = loss(x, indices)
    indices[1] = 0
    with pytest.raises(AutogradError, match="changed in place"):
        result.backward()
    assert x.grad is None


@pytest.mark.parametrize("function", [functional.dropout, lambda x, c: functional.where(c, x, 0.0)])
def test_a_changed_mask_or_condition_is_found(function: Callable[..., Tensor]) -> None:
    x, chosen = Tensor(np.ones(3), requires_grad=True), np.array([True, False, True])
    result = function(x, chosen)
    chosen[1] = True
    with pytest.raises(AutogradError, match="changed in place"):
        result.sum().backward()


@pytest.mark.parametrize("change", ["all", "half", "every third", "a row in 50"])
def test_changes_of_a_large_array_are_found(change: str, rng: Rng) -> None:
    """Of large arrays samples are remembered, spread evenly: what is changed there is seen."""
    x = Tensor(rng.standard_normal((400, 300)), requires_grad=True)
    loss = (x * x).sum()
    if change == "all":
        x.data *= 1.5
    elif change == "half":
        x.data[200:] = 0
    elif change == "every third":
        x.data.reshape(-1)[::3] += 1
    else:
        x.data.reshape(50, -1)[int(rng.integers(50))] += 1
    with pytest.raises(AutogradError, match=r"multiply: .*shape \(400, 300\)"):
        loss.backward()


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_one_element_of_a_small_array_is_found(size: int, rng: Rng) -> None:
    """Up to 128 of float64 are remembered one by one; beyond, at least their first."""
    x = Tensor(rng.standard_normal(size), requires_grad=True)
    loss = functional.sin(x).sum()
    x.data[int(rng.integers(size)) if size <= 128 else 0] += 1
    with pytest.raises(AutogradError, match="backward through sin"):
        loss.backward()


def test_a_change_after_backward_is_nobodys_business() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    for _ in range(3):
        (x * x).sum().backward()
        x.data -= 0.1 * x.grad
        x.zero_grad()


def test_a_change_back_is_none() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    loss = (x * x).sum()
    x.data += 1
    x.data -= 1
    loss.backward()
    np.testing.assert_array_equal(x.grad, [2, 4])


def test_a_graph_that_met_a_change_can_go_back_once_it_is_undone() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    loss = (y + x * 3.0).sum()
    x.data[0] = 9
    with pytest.raises(AutogradError, match="changed in place"):
        loss.backward()
    x.data[0] = 1
    loss.backward()
    np.testing.assert_array_equal(x.grad, [5, 7])


def test_vjp_finds_changes_too() -> None:
    x = np.array([1.0, 2.0])
    _, pull = vjp(lambda t: t * t, x)
    np.testing.assert_array_equal(pull(np.ones(2)), [2, 4])
    x[0] = 5
    with pytest.raises(AutogradError, match="changed in place"):
        pull(np.ones(2))


def alive(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[bool, Tensor]:
    """Tell whether the array between a leaf and `function` lives on after the forward pass."""
    between = Tensor(np.full(shape, 0.5), requires_grad=True) + 1.0
    end = weakref.ref(between.data)
    result = function(between)
    del between
    gc.collect()
    return end() is not None, result


OF_ONE = [name for name, (shapes, _) in FREE.items() if len(shapes) == 1]


@pytest.mark.parametrize("name", OF_ONE)
def test_an_input_that_no_adjoint_needs_is_freed_after_forward(name: str) -> None:
    shapes, options = FREE[name]
    kept, result = alive(lambda t: apply(name, t, **options), shapes[0])
    assert not kept
    assert result.requires_grad


def test_more_inputs_that_are_freed_after_forward() -> None:
    for function in (
        lambda t: t + np.ones(4),
        lambda t: t * 2.0,
        lambda t: t / np.full(4, 2.0),
        lambda t: t @ np.ones((4, 2)),
        lambda t: functional.linear(t, np.ones((2, 4)), np.ones(2)),
        lambda t: functional.layer_norm(t, np.ones(4), np.ones(4)),
        lambda t: t[np.array([0, 1])],
    ):
        kept, _ = alive(function, (3, 4))
        assert not kept


def test_an_input_that_an_adjoint_needs_is_kept() -> None:
    """So that the tests of what is freed do not pass for another reason."""
    kept, _ = alive(lambda t: t * t, (3, 4))
    assert kept


def test_backward_frees_arrays_on_its_way() -> None:
    x = Tensor(np.ones(4), requires_grad=True)
    first = x * x
    kept = weakref.ref(first.data)
    second = first * first
    seen: list[bool] = []
    weight = Tensor(np.ones(4), requires_grad=True)
    loss = (second * weight).sum()
    del first, second
    x.on_gradient(lambda _: seen.append(kept() is not None))
    assert kept() is not None
    loss.backward()
    assert seen == [False]  # while the graph is still being walked


def test_no_grad_keeps_nothing() -> None:
    with no_grad():
        kept, result = alive(lambda t: t * t, (3, 4))
    assert not kept
    assert result.node is None
