"""`summary`: rows, totals and FLOPs, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpidl import Tensor, functional, nn
from mpidl.autograd import recording, trace
from mpidl.errors import AutogradError
from mpidl.nn.flops import flops

Rng = np.random.Generator


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Dropout(0.5),
    )


def test_rows_and_totals() -> None:
    found = small().summary((3, 2, 4, 4))
    rows = [(r.name, r.kind, r.depth, r.output, r.parameters, r.flops) for r in found.rows]
    assert rows == [
        ("", "Sequential", 0, (3, 5), 0, 0),
        ("0", "Conv2d", 1, (3, 6, 4, 4), 6 * 9 + 6, 2 * (3 * 6 * 16) * 9),
        ("1", "BatchNorm2d", 1, (3, 6, 4, 4), 12, 3 * 6 * 16),
        ("2", "ReLU", 1, (3, 6, 4, 4), 0, 3 * 6 * 16),
        ("3", "MaxPool2d", 1, (3, 6, 2, 2), 0, 3 * 6 * 16),
        ("4", "Flatten", 1, (3, 24), 0, 0),
        ("5", "Linear", 1, (3, 5), 24 * 5 + 5, 2 * 3 * 24 * 5),
        ("6", "Dropout", 1, (3, 5), 0, 0),
    ]
    assert found.parameters == 60 + 12 + 125
    assert found.flops == sum(r.flops for r in found.rows)
    assert found.input == (3, 2, 4, 4)


def test_the_table_is_plain_text() -> None:
    text = str(small().summary((1, 2, 4, 4)))
    assert text.splitlines() == [
        "input (1, 2, 4, 4)",
        "layer  kind         output        parameters  FLOPs",
        "---------------------------------------------------",
        "model  Sequential   (1, 5)                 0      0",
        "  0    Conv2d       (1, 6, 4, 4)          60  1,728",
        "  1    BatchNorm2d  (1, 6, 4, 4)          12     96",
        "  2    ReLU         (1, 6, 4, 4)           0     96",
        "  3    MaxPool2d    (1, 6, 2, 2)           0     96",
        "  4    Flatten      (1, 24)                0      0",
        "  5    Linear       (1, 5)               125    240",
        "  6    Dropout      (1, 5)                 0      0",
        "---------------------------------------------------",
        "total                                    197  2,256",
    ]


def test_a_block_counts_its_own_sums_apart_from_what_lies_below() -> None:
    n, length, width, heads, hidden = 2, 5, 6, 3, 7
    found = nn.TransformerBlock(width, heads, hidden=hidden).summary((n, length, width))
    rows = {r.name: r for r in found.rows}
    places = n * length
    assert rows[""].flops == 2 * places * width  # the two sums
    assert rows["attention"].flops == 2 * (2 * n * heads * length**2 * width // heads)
    assert rows["attention.qkv"].flops == 2 * places * width * 3 * width
    assert rows["attention.out"].depth == 2
    assert rows["mlp.0"].flops == 2 * places * width * hidden
    assert rows["norm1"].parameters == 2 * width
    assert found.parameters == sum(
        p.size for p in nn.TransformerBlock(width, heads, hidden=hidden).parameters()
    )


class Net(nn.Module):
    """Parameters of its own, lists, a shared layer, and one that is never called."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(np.ones(3, np.float32))
        self.blocks = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.heads = {"used": nn.Linear(3, 2), "spare": nn.Linear(3, 9)}
        self.loose = nn.ReLU()

    def forward(self, x: Any) -> Tensor:
        y = self.blocks[0](x * self.scale)
        y = self.blocks[1](self.blocks[0](y))
        return self.heads["used"](y)


def test_custom_modules(rng: Rng) -> None:
    model = Net()
    found = model.summary(rng.standard_normal((4, 3)))  # float64: converted, as by `predict`
    assert [(r.name, r.output, r.parameters, r.flops) for r in found.rows] == [
        ("", (4, 2), 3, 12),
        ("blocks.0", (4, 3), 12, 72),
        ("blocks.0", (4, 3), 0, 72),  # called again: its parameters are counted
        ("blocks.1", (4, 3), 12, 72),
        ("heads.used", (4, 2), 8, 48),
        ("heads.spare", None, 36, 0),
    ]
    assert found.parameters == sum(p.size for p in model.parameters())
    assert "  heads.spare  Linear  -" in str(found)


def test_names_stand_relative_to_the_module_above() -> None:
    found = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()).summary((2, 2))
    assert [line.split("  Se")[0].rstrip() for line in str(found).splitlines()[3:5]] == [
        "model", "  0"
    ]  # fmt: skip
    assert str(found).splitlines()[5].startswith("    0  ReLU")


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert nn.Sequential(first, second).summary((1, 3)).parameters == 9 + 3 + 3


def test_whole_numbers_as_example() -> None:
    found = nn.Sequential(nn.Embedding(9, 4), nn.Flatten()).summary(np.zeros((2, 5), np.int64))
    assert [(r.output, r.flops) for r in found.rows] == [((2, 20), 0), ((2, 5, 4), 0), ((2, 20), 0)]


def test_the_model_is_left_as_it_was(rng: Rng) -> None:
    model = small()
    model.layers[1].training = False
    modes, before = [m.training for m in model.modules()], model.state_dict()
    calls = []
    model.on_forward(lambda m, _: calls.append((m.training, recording())))
    model.summary(rng.standard_normal((3, 2, 4, 4)))
    assert calls == [(False, False)]
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(AutogradError, match="conv2d of shapes"):
        model.summary((1, 3, 4, 4))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._hooks) + len(m._output_hooks) for m in model.modules()] == [1] + [0] * 7
    assert recording()


EINSUMS = [
    ("ij,jk->ik", [(2, 3), (3, 4)], 2 * 2 * 3 * 4),
    ("bij, bjk -> bik", [(5, 2, 3), (5, 3, 4)], 2 * 5 * 2 * 3 * 4),
    ("...ij,...jk->...ik", [(5, 2, 3), (3, 4)], 2 * 5 * 2 * 3 * 4),
    ("...i,i...->i", [(2, 3), (3, 2)], 2 * 2 * 3),
    ("ij->", [(2, 3)], 6),
    ("i,i,i->i", [(4,), (4,), (4,)], 12),
    ("...,a...->a...", [(3, 4), (2, 5, 1, 4)], 2 * 2 * 5 * 3 * 4),
]


@pytest.mark.parametrize(("subscripts", "shapes", "expected"), EINSUMS)
def test_flops_of_einsum(subscripts: str, shapes: list[Any], expected: int, rng: Rng) -> None:
    arrays = [rng.standard_normal(s) for s in shapes]
    with trace() as records:
        functional.einsum(subscripts, *arrays)
    assert [flops(r) for r in records] == [expected]


def test_flops_of_other_operations(rng: Rng) -> None:
    x, y = Tensor(rng.standard_normal((2, 3, 4))), rng.standard_normal((4, 5))
    q, k = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 6, 4))
    v = rng.standard_normal((2, 6, 7))
    with trace() as records:
        _ = x @ y
        _ = x + 1
        _ = x.sum()
        _ = x.reshape(6, 4).T[0]
        functional.attention(q, k, v, causal=True)
        functional.avg_pool2d(rng.standard_normal((1, 1, 4, 4)), 2)
    counts = [flops(r) for r in records]
    assert counts == [2 * 6 * 4 * 5, 24, 24, 0, 0, 0, 2 * 2 * 3 * 6 * (4 + 7), 16]
