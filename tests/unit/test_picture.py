"""`draw`: what stands in the picture, and what graphviz makes of it."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest

import mpidl
from mpidl import Tensor, functional, nn
from mpidl.autograd import draw, trace
from mpidl.autograd.graph import survey
from mpidl.autograd.tape import Node
from mpidl.errors import AutogradError, InvalidArgument, MpidlError
from tests.unit.operations import CASES

if TYPE_CHECKING:
    from pathlib import Path

Rng = np.random.Generator

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz")
WHITE = "{http://www.w3.org/2000/svg}"


def leaf(*shape: int, dtype: Any = np.float32) -> Tensor:
    return mpidl.tensor(np.ones(shape), requires_grad=True, dtype=dtype)


def labels(dot: str) -> dict[str, str]:
    """Return the label of each vertex."""
    return dict(re.findall(r'^  (\w+) \[label="(.*?)"[,\]]', dot, re.MULTILINE))


def edges(dot: str) -> Counter[tuple[str, str, str]]:
    """Return the edges, from and to labels, with their own."""
    names = {**labels(dot), "result": "result"}
    found = re.findall(r'^  (\w+) -> (\w+) \[label=" ?(.*?)"[,\]]', dot, re.MULTILINE)
    return Counter((names[a], names[b], label) for a, b, label in found)


def text_of(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{WHITE}text")]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_each_operation_has_the_shapes_it_ran_with(name: str, dtype: Any, rng: Rng) -> None:
    function, arrays = CASES[name](rng)
    leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    # of some inputs a leaf, of others a result: whose adjoints are asked differs
    plain = [x if rng.integers(2) else x * 1.0 for x in leaves]
    with trace() as records:
        value = function(*plain)
        loss = value.sum()
    results = {id(r.result.node): r.result for r in records if isinstance(r.result.node, Node)}
    found = {id(v.source): v for v in survey(loss)}
    assert results.keys() <= found.keys()
    for key, result in results.items():
        assert (found[key].shape, found[key].dtype) == (result.shape, result.dtype)

    loss.backward()  # as if nobody had looked
    wanted = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    function(*wanted).sum().backward()
    for x, other in zip(leaves, wanted, strict=True):
        assert (x.grad is None) == (other.grad is None)
        if x.grad is not None:
            np.testing.assert_array_equal(x.grad, other.grad)


def test_adjoints_that_share_their_work_are_left_as_they_were(rng: Rng) -> None:
    """A leaf beside results: what was computed for these with zeros is not the leaf's gradient."""
    arrays = [rng.standard_normal((1, 3, 4)) for _ in range(3)]

    def gradients(*, looks: bool) -> list[Any]:
        q, k, v = (Tensor(a, requires_grad=True) for a in arrays)
        loss = functional.attention(q, k * 2.0, v * 2.0).exp().sum()
        if looks:
            draw(loss)
        loss.backward()
        return [q.grad, k.grad, v.grad]

    for found, wanted in zip(gradients(looks=True), gradients(looks=False), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_network() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    loss = nn.cross_entropy(model(np.ones((2, 4), np.float32)), np.array([0, 2]))
    picture = draw(loss, model)
    f = "float32 "
    assert edges(picture.dot) == Counter(
        [
            ("0.weight", "linear", f + "(5, 4)"),
            ("0.bias", "linear", f + "(5,)"),
            ("linear", "relu", f + "(2, 5)"),
            ("relu", "linear", f + "(2, 5)"),
            ("2.weight", "linear", f + "(3, 5)"),
            ("2.bias", "linear", f + "(3,)"),
            ("linear", "cross_entropy", f + "(2, 3)"),
            ("cross_entropy", "result", f + "()"),
        ]
    )
    assert repr(picture) == "Picture(4 operations, 4 leaves)"
    assert str(picture) == picture.dot
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_leaf_used_twice_stands_once_with_two_arrows() -> None:
    w, v = leaf(3), leaf(3, dtype=np.float64)
    dot = draw(w * w + v, params={"w": w, "v": v}).dot
    assert edges(dot)["w", "multiply", "float32 (3,)"] == 2
    assert edges(dot)["add", "result", "float64 (3,)"] == 1
    assert sorted(labels(dot).values()) == ["add", "multiply", "v", "w"]
    assert sorted(labels(draw(w * v, params={"w": w}).dot).values()) == ["leaf", "multiply", "w"]
    assert edges(draw(w).dot) == Counter([("leaf", "result", "float32 (3,)")])


def test_who_sums_over_ranks_is_not_asked() -> None:
    """Others would wait for this rank, or it for them."""

    def total(_: Any) -> Any:
        raise AssertionError("a message")

    x, one = leaf(4, 3), np.ones(3, np.float32)
    options = {"mean": one, "var": one, "eps": 1e-5, "count": 4.0, "total": total}
    y = functional.batch_norm(x * 2.0, leaf(3), leaf(3), **options)
    assert edges(draw(y.exp()).dot) == Counter(
        [
            ("leaf", "multiply", "float32 (4, 3)"),
            ("multiply", "batch_norm", "float32 (4, 3)"),
            ("leaf", "batch_norm", "float32 (3,)"),
            ("leaf", "batch_norm", "float32 (3,)"),
            ("batch_norm", "exp", "float32 (4, 3)"),
            ("exp", "result", "float32 (4, 3)"),
        ]
    )


def test_large_graphs_need_no_recursion() -> None:
    w = x = leaf(2)
    for _ in range(10_000):
        x = x * 1.0
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        picture = draw(x, params={"w": w})
    finally:
        sys.setrecursionlimit(before)
    assert repr(picture) == "Picture(10000 operations, 1 leaf)"
    assert edges(picture.dot).total() == 10_001


def test_what_backward_freed() -> None:
    w = leaf(2)
    middle = w * 2.0
    loss, other = middle.sum(), (middle + 1.0).mean()
    loss.backward()
    with pytest.raises(AutogradError, match="freed the graph of this sum; draw before backward"):
        draw(loss)
    dot = draw(other).dot  # what is left
    assert edges(dot) == Counter(
        [
            ("multiply (freed)", "add", "float32 (2,)"),
            ("add", "mean", "float32 (2,)"),
            ("mean", "result", "float32 ()"),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "expected a Tensor, found 3"),
        ((mpidl.tensor([1.0]),), {}, "depends on nothing that requires a gradient"),
        ((leaf(1), 7), {}, "draw model=7: expected a model"),
        ((leaf(1), {"w": leaf(1)}), {}, "draw model=.*: expected a model"),
        ((leaf(1),), {"params": 7}, "draw params=7: expected a dict of names"),
    ],
)
def test_wrong_arguments(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(AutogradError, match=message):
        draw(*arguments, **options)


ODD = ["a\\", 'say "w"', "\\N", "&lt;b&gt;", "<b>", "é\N{SNOWMAN}", "a\nb", "\0\ud800", "]; x", ""]


@needs_dot
def test_any_name_is_shown_as_it_is(rng: Rng) -> None:
    drawn = ["".join(map(chr, rng.integers(1, 0x3000, 8))) for _ in range(30)]
    names = list(dict.fromkeys([*ODD, *drawn]))
    leaves = {name: leaf(1) for name in names}
    picture = draw(functional.stack(list(leaves.values())), params=leaves)
    shown = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]
    wanted = Counter(" ".join(name.split()) for name in shown)
    wanted += Counter(
        ["stack", "result", *["float32 (1,)"] * len(names), f"float32 ({len(names)}, 1)"]
    )
    found = Counter(" ".join(text.split()) for text in text_of(picture.svg))
    assert {k: n for k, n in found.items() if k} == {k: n for k, n in wanted.items() if k}


@needs_dot
def test_files(tmp_path: Path) -> None:
    picture = draw((leaf(2) * 2.0).sum())
    begins = {
        "svg": b"<svg",
        "png": b"\x89PNG",
        "pdf": b"%PDF",
        "dot": b"digraph",
        "gv": b"digraph",
    }
    for suffix, magic in begins.items():
        picture.save(tmp_path / f"graph.{suffix}")
        assert (tmp_path / f"graph.{suffix}").read_bytes().startswith(magic)
    assert (tmp_path / "graph.svg").read_text() == picture.svg == picture._repr_svg_()
    assert picture._repr_html_() is None
    assert 'fill="white"' not in picture.svg  # nothing behind it, on a dark page either
    for name in ("graph", "graph.jpg"):
        with pytest.raises(InvalidArgument, match=r"ends in \.dot, \.gv, \.svg"):
            picture.save(tmp_path / name)
    with pytest.raises(InvalidArgument, match="cannot write"):
        picture.save(tmp_path / "no" / "graph.dot")


def test_without_graphviz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    picture = draw((leaf(2) * 2.0).sum(), params={})
    picture.save(tmp_path / "graph.dot")
    assert (tmp_path / "graph.dot").read_text() == str(picture)
    with pytest.raises(MpidlError, match="apt install graphviz"):
        picture.save(tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()
    assert picture._repr_svg_() is None
    assert "<pre>digraph {" in (picture._repr_html_() or "")
    x = leaf(2)
    for _ in range(1000):
        x = x * 1.0
    assert draw(x)._repr_html_() == "<pre>Picture(1000 operations, 1 leaf)</pre>"


def test_a_dot_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\necho no fonts >&2; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    picture = draw(leaf(2) * 2.0)
    with pytest.raises(MpidlError, match="ended with status 3: no fonts"):
        picture.save(tmp_path / "graph.png")
    assert picture._repr_svg_() is None
