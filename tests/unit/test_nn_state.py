"""What a module holds: buffers, `state_dict`, dtypes; and `predict`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, data, nn
from mpidl.autograd import recording
from mpidl.errors import AutogradError, InvalidArgument

Rng = np.random.Generator


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)
    )


NAMES = [
    "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    "4.weight", "4.bias",
]  # fmt: skip


def pictures(rng: Rng, n: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal((n, 2, 4, 4)).astype(dtype)


def test_the_state_is_all_parameters_and_buffers_in_order() -> None:
    model = make_model()
    state = model.state_dict()
    assert list(state) == NAMES
    assert list(model.named_buffers()) == ["1.running_mean", "1.running_var"]
    assert list(model.named_parameters()) == [n for n in NAMES if "running" not in n]
    assert [b is c for b, c in zip(model.buffers(), model.named_buffers().values(), strict=True)]
    for name, tensor in model.named_state().items():
        np.testing.assert_array_equal(state[name], tensor.data)
        assert not np.shares_memory(state[name], tensor.data)


def test_buffers_get_no_gradient(rng: Rng) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            self.scale = nn.Buffer(np.full(2, 3.0))
            self.weight = nn.Parameter(np.ones(2))
            self.steps = [nn.Buffer(np.zeros(1, np.int64))]

        def forward(self, x: Any) -> Tensor:
            return self.weight * self.scale * x

    model = Net()
    model(np.ones(2)).sum().backward()
    assert not model.scale.requires_grad
    assert model.scale.grad is None
    np.testing.assert_array_equal(model.weight.grad, [3, 3])
    assert list(model.named_buffers()) == ["scale", "steps.0"]
    assert list(model.named_parameters()) == ["weight"]


def test_a_state_makes_another_model_the_same(rng: Rng) -> None:
    trained, other = make_model(), make_model()
    for tensor in trained.named_state().values():
        tensor.data[...] = rng.uniform(0.5, 1.5, tensor.shape)
    memory = [t.data for t in other.named_state().values()]
    other.load_state_dict(trained.state_dict())
    assert all(a is t.data for a, t in zip(memory, other.named_state().values(), strict=True))
    x = pictures(rng, 3)
    np.testing.assert_array_equal(other.eval()(x).data, trained.eval()(x).data)


def test_a_state_is_converted_to_the_dtype_of_the_model() -> None:
    model, other = make_model(), make_model().astype(np.float64)
    other.load_state_dict(model.state_dict())
    assert {t.dtype for t in other.named_state().values()} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(other.layers[0].weight.data, model.layers[0].weight.data)
    model.load_state_dict({name: value.tolist() for name, value in other.state_dict().items()})


def test_missing_unexpected_and_misshapen_are_all_named_and_nothing_changes() -> None:
    model = make_model()
    before = model.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    del state["0.bias"], state["1.running_var"]
    state["head.weight"] = np.zeros(1)
    state["4.bias"] = np.zeros((5, 1))
    state["4.weight"] = state["4.weight"].astype(str)
    with pytest.raises(InvalidArgument) as caught:
        model.load_state_dict(state)
    for words in (
        "Sequential",
        "0.bias is missing",
        "1.running_var is missing",
        "head.weight is unexpected",
        "4.bias has shape (5, 1), expected (5,)",
        "4.weight has dtype <U",
        "strict=False",
    ):
        assert words in str(caught.value)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_what_fits_is_loaded_if_not_strict() -> None:
    model = make_model()
    before = model.state_dict()
    model.load_state_dict({"4.bias": np.arange(5), "head": np.zeros(2)}, strict=False)
    np.testing.assert_array_equal(model.layers[4].bias.data, np.arange(5))
    np.testing.assert_array_equal(model.layers[0].bias.data, before["0.bias"])
    with pytest.raises(InvalidArgument, match=r"4\.bias has shape \(4,\), expected \(5,\)$"):
        model.load_state_dict({"4.bias": np.zeros(4)}, strict=False)


def test_modules_are_named_once_parents_first() -> None:
    model = make_model()
    twice = nn.Sequential(model, model.layers[0])
    names = ["", "0", "0.0", "0.1", "0.2", "0.3", "0.4"]
    assert list(twice.named_modules()) == names
    assert twice.named_modules()["0.4"] is model.layers[4]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_astype_converts_all_but_whole_numbers(dtype: Any, rng: Rng) -> None:
    model = make_model()
    model.steps = nn.Buffer(np.zeros(1, np.int64))  # type: ignore[attr-defined]
    model(pictures(rng, 2)).sum().backward()
    assert model.astype(dtype) is model
    kinds = {name: t.dtype for name, t in model.named_state().items()}
    assert kinds.pop("steps") == np.int64
    assert set(kinds.values()) == {np.dtype(dtype)}
    assert all(p.grad is None for p in model.parameters())  # of the old dtype
    if dtype is np.float64:
        y = model(pictures(rng, 2, dtype))
        y.sum().backward()
        assert {p.grad.dtype for p in model.parameters()} == {np.dtype(dtype)}


def test_astype_leaves_the_frozen_frozen() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad = False
    layer.astype("float64")
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_a_new_dtype_keeps_hooks_and_forgets_gradients_of_the_frozen(rng: Rng) -> None:
    layer, seen = nn.Linear(2, 3), []
    layer.weight.on_gradient(lambda p: seen.append(p.grad.dtype))
    x = rng.standard_normal((4, 2))
    layer(x.astype(np.float32)).sum().backward()
    layer.weight.requires_grad = False
    layer.astype("float64")
    layer.weight.requires_grad = True
    assert layer.weight.grad is None
    layer(x).sum().backward()
    assert seen == [np.float32, np.float64]
    np.testing.assert_allclose(layer.weight.grad, [x.sum(axis=0)] * 3, rtol=1e-12)


def test_zero_grad_forgets_all_gradients(rng: Rng) -> None:
    """Of layers below too, and of a frozen parameter: that has none."""
    model = make_model()
    model(pictures(rng, 2)).sum().backward()
    memory = [p.grad for p in model.parameters()]
    model.layers[4].bias.requires_grad = False
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model(pictures(rng, 2)).sum().backward()
    found = [p.grad for p in model.parameters()]
    assert found.pop() is None
    assert all(a is b for a, b in zip(found, memory, strict=False))


@pytest.mark.parametrize(
    ("logits", "target"), [((7,), (7,)), ((7, 1), (7,)), ((7,), (7, 1)), ((7, 3), (7, 3))]
)
@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_binary_accuracy(
    logits: tuple[int, ...], target: tuple[int, ...], dtype: Any, rng: Rng
) -> None:
    x, t = rng.standard_normal(logits), rng.integers(0, 2, target).astype(dtype)
    x.flat[0] = 0  # not above 0
    pairs = zip(x.ravel().tolist(), t.ravel().tolist(), strict=True)
    expected = sum(bool(b) == (a > 0) for a, b in pairs) / x.size
    found = nn.binary_accuracy(Tensor(x), t)
    assert type(found) is float
    assert found == pytest.approx(expected, rel=1e-12)


def test_binary_accuracy_of_nothing_and_of_shapes_that_do_not_fit() -> None:
    assert nn.binary_accuracy(Tensor(np.zeros((0, 1))), np.zeros(0)) == 0
    for logits, target in (((3, 2), (3,)), ((3,), (3, 2)), ((3, 1), (1, 3)), ((4,), (3,))):
        with pytest.raises(InvalidArgument, match=r"binary_accuracy of logits \(\d"):
            nn.binary_accuracy(Tensor(np.zeros(logits)), np.zeros(target))


def test_a_copy_has_state_and_no_hooks(rng: Rng) -> None:
    model = make_model()
    model.on_output(lambda *_: pytest.fail("a copy calls the hook"))
    model.on_forward(lambda *_: pytest.fail("a copy calls the hook"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(pictures(rng, 2))
        assert twin.layers[1].running_mean.data.any()
    assert not model.layers[1].running_mean.data.any()


def test_a_hook_sees_the_output_until_it_is_removed() -> None:
    layer, seen = nn.ReLU(), []
    remove = layer.on_output(lambda module, inputs, output: seen.append((module, inputs, output)))
    x = np.ones(2)
    y = layer(x)
    remove()
    layer(x)
    assert len(seen) == 1
    assert seen[0][0] is layer
    assert seen[0][1][0] is x
    assert seen[0][2] is y


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_predict_is_forward_in_pieces(batch_size: int, rng: Rng) -> None:
    model = make_model()
    model.layers[1].running_mean.data[...] = rng.standard_normal(3)
    model.layers[4].training = False  # modes may be mixed
    x = pictures(rng, 7)
    before, modes = model.state_dict(), [m.training for m in model.modules()]
    calls = []
    model.on_forward(lambda m, i: calls.append((m.training, recording(), len(i[0]))))
    found = model.predict(x, batch_size=batch_size)
    assert type(found) is np.ndarray
    assert [m.training for m in model.modules()] == modes
    assert sum(n for *_, n in calls) == 7
    assert max(n for *_, n in calls) == min(7, batch_size)
    assert {c[:2] for c in calls} == {(False, False)}
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_allclose(found, model.eval()(x).data, rtol=1e-4, atol=1e-6)


def test_predict_takes_data_sets_other_dtypes_tensors_and_lists(rng: Rng) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    x = rng.standard_normal((5, 3))
    expected = model.predict(x.astype(np.float32))
    assert expected.dtype == np.float32
    samples = data.ArrayDataset(x, np.zeros(5))
    for given in (x, Tensor(x), x.tolist(), samples):
        np.testing.assert_array_equal(model.predict(given, batch_size=5), expected)
    np.testing.assert_allclose(model.predict(samples, batch_size=2), expected, rtol=1e-5)


def test_predict_leaves_whole_numbers_alone() -> None:
    model = nn.Embedding(9, 2)
    np.testing.assert_array_equal(model.predict(np.arange(9)), model.weight.data)


def test_predict_of_no_samples_has_the_shape_of_outputs(rng: Rng) -> None:
    assert make_model().predict(pictures(rng, 0)).shape == (0, 5)
    assert nn.ReLU().predict(np.zeros((0, 3))).shape == (0, 3)


def test_predict_gives_the_mode_back_after_an_error() -> None:
    model = make_model()
    with pytest.raises(AutogradError, match="conv2d of shapes"):
        model.predict(np.zeros((2, 3, 4, 4), np.float32))
    assert all(m.training for m in model.modules())
    assert recording()


def test_predict_refuses_a_batch_size_below_1() -> None:
    with pytest.raises(InvalidArgument, match="batch_size=0: expected 1 or more"):
        make_model().predict(np.zeros((1, 2, 4, 4)), batch_size=0)
