"""Layers and modules: values against plain NumPy, names of parameters, modes and hooks."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mpidl import Tensor, nn
from mpidl.errors import DeviceNotFound, InvalidArgument


def test_linear_is_a_matrix_product(rng: np.random.Generator) -> None:
    n, inputs, outputs = map(int, rng.integers(1, 9, 3))
    layer = nn.Linear(inputs, outputs)
    x = rng.standard_normal((n, inputs)).astype(np.float32)
    expected = x @ layer.weight.data.T + layer.bias.data
    np.testing.assert_allclose(layer(x).data, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(layer(Tensor(x)).data, layer(x).data)


def test_linear_without_bias(rng: np.random.Generator) -> None:
    layer = nn.Linear(3, 2, bias=False)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_allclose(layer(x).data, x @ layer.weight.data.T, rtol=1e-6, atol=1e-6)
    assert list(layer.named_parameters()) == ["weight"]


def test_linear_starts_uniform_within_one_over_the_root_of_its_inputs() -> None:
    layer = nn.Linear(100, 300)
    for p in layer.parameters():
        assert p.dtype == np.float32
        assert 0.09 < np.abs(p.data).max() <= np.float32(0.1)
        assert abs(p.data.mean()) < 0.03  # 9 standard errors of the 300 values of the bias


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
def test_linear_refuses_sizes_below_one(sizes: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match=rf"Linear\({sizes[0]}, {sizes[1]}\)"):
        nn.Linear(*sizes)


def test_activations(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4))
    np.testing.assert_array_equal(nn.ReLU()(x).data, np.where(x > 0, x, 0))
    np.testing.assert_allclose(nn.Sigmoid()(x).data, 1 / (1 + np.exp(-x)), rtol=1e-12)
    np.testing.assert_allclose(nn.Tanh()(x).data, np.tanh(x), rtol=1e-12)


def test_a_sequence_is_one_after_the_other(rng: np.random.Generator) -> None:
    first, last = nn.Linear(3, 5), nn.Linear(5, 2)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    found = nn.Sequential(first, nn.Tanh(), last)(x)
    np.testing.assert_array_equal(found.data, last(nn.Tanh()(first(x))).data)
    np.testing.assert_array_equal(nn.Sequential()(x), x)


def test_parameters_of_a_sequence_are_named_by_number() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    shapes = {name: p.shape for name, p in model.named_parameters().items()}
    assert list(shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert shapes == {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}


class Tower(nn.Module):
    """Parameters directly, in a list, in a tuple, and in modules below."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(np.ones(1, np.float32))
        self.blocks = [nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2, bias=False)]
        self.pair = (nn.Parameter(np.zeros(3, np.float32)), "no parameter")
        self.head = nn.Linear(2, 1)
        self.size = 5


def test_parameters_are_found_in_modules_lists_and_tuples() -> None:
    assert list(Tower().named_parameters()) == [
        "scale",
        "blocks.0.0.weight",
        "blocks.0.0.bias",
        "blocks.1.weight",
        "pair.0",
        "head.weight",
        "head.bias",
    ]


def test_what_is_shared_is_listed_once() -> None:
    first, second, again = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    model = nn.Sequential(first, second, again, again)
    assert list(model.named_parameters()) == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]


def test_the_gradient_of_a_shared_parameter_counts_both_uses(rng: np.random.Generator) -> None:
    layer = nn.Linear(3, 3)
    x = rng.standard_normal((2, 3)).astype(np.float32)
    nn.Sequential(layer, layer)(x).sum().backward()
    once, twice = nn.Linear(3, 3), nn.Linear(3, 3)
    for p, q, r in zip(layer.parameters(), once.parameters(), twice.parameters(), strict=True):
        q.data[...], r.data[...] = p.data, p.data
    nn.Sequential(once, twice)(x).sum().backward()
    for p, q, r in zip(layer.parameters(), once.parameters(), twice.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad + r.grad, rtol=1e-5, atol=1e-6)


def test_attributes_of_a_subclass_of_a_sequence_are_found_too() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))
            self.gain = nn.Parameter(np.ones(1, np.float32))

    assert set(Net().named_parameters()) == {"0.weight", "0.bias", "gain"}


def test_training_mode_reaches_all_modules() -> None:
    model = Tower()
    assert [m.training for m in model.modules()] == [True] * 5
    assert model.eval() is model
    assert [m.training for m in model.modules()] == [False] * 5
    assert model.blocks[0].layers[0].training is False
    assert model.train() is model
    assert [m.training for m in model.modules()] == [True] * 5
    assert nn.ReLU().training  # another instance is as it was


def test_a_forward_hook_sees_the_inputs_until_it_is_removed() -> None:
    layer, other = nn.ReLU(), nn.ReLU()
    seen: list[tuple[object, object]] = []
    remove = layer.on_forward(lambda module, inputs: seen.append((module, inputs[0])))
    x = np.ones(2)
    layer(x)
    other(x)
    assert len(seen) == 1
    assert seen[0][0] is layer
    assert seen[0][1] is x
    remove()
    remove()  # twice is no error
    layer(x)
    assert len(seen) == 1


def test_removing_a_hook_leaves_the_others() -> None:
    layer = nn.ReLU()
    seen: list[str] = []
    remove = layer.on_forward(lambda *_: seen.append("first"))
    layer.on_forward(lambda *_: seen.append("second"))
    layer(np.ones(1))
    remove()
    layer(np.ones(1))
    assert seen == ["first", "second", "second"]


def test_a_hook_runs_before_forward() -> None:
    class Logged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            order.append("forward")
            return x

    order: list[str] = []
    model = Logged()
    model.on_forward(lambda *_: order.append("hook"))
    model(np.ones(1))
    assert order == ["hook", "forward"]


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[np.ndarray]:
        nn.seed(seed)
        return [p.data for _ in range(2) for p in nn.Linear(4, 4).parameters()]

    for a, b in zip(weights(1), weights(1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(weights(1)[0], weights(2)[0])
    assert not np.array_equal(weights(1)[0], weights(1)[2])


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Tower defines no forward"):
        Tower()(np.ones(1))


def test_the_gpu_without_cupy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes its import fail
    with pytest.raises(DeviceNotFound, match=r"needs CuPy: pip install 'mpidl\[cuda12\]'"):
        nn.Linear(2, 2).to("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="device 'tpu': expected 'cpu' or 'cuda'"):
        nn.Linear(2, 2).to("tpu")


def test_the_cpu_is_where_parameters_are() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.data
    assert layer.to("cpu") is layer
    assert layer.weight.data is before


def test_parameters_in_nested_lists_and_dicts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            self.blocks = [[nn.Linear(1, 1, bias=False)], {"deep": nn.Linear(1, 1, bias=False)}]
            self.heads = {"a": nn.Parameter(np.zeros(1))}

    names = ["blocks.0.0.weight", "blocks.1.deep.weight", "heads.a"]
    assert list(Net().named_parameters()) == names


def test_a_child_may_know_its_parent() -> None:
    parent, child = nn.Module(), nn.Linear(1, 1)
    parent.child, child.parent = child, parent  # type: ignore[attr-defined]
    assert list(parent.named_parameters()) == ["child.weight", "child.bias"]
    parent.eval()
    assert not child.training


def test_a_hook_added_twice_is_removed_once() -> None:
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)

    layer = nn.ReLU()
    remove = layer.on_forward(hook)
    layer.on_forward(hook)
    remove()
    layer(np.ones(1))
    assert calls == [1]
