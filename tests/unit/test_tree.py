"""The tree of microbatches: the same sums, however its leaves are spread."""

from __future__ import annotations

import numpy as np
import pytest

from mpidl.errors import InvalidArgument
from mpidl.tree import Sum, Tree, add, depth


def in_words(what: Sum, words: list[str]) -> str:
    if isinstance(what, int):
        return words[what]
    return f"({in_words(what[0], words)} {in_words(what[1], words)})"


def of_one(leaves: int, held: range) -> str:
    """How one process adds up these leaves: the halves first."""
    tree = Tree(leaves, ((0,),))
    singles = [range(i, i + 1) for i in range(leaves)]
    (what,) = tree.sums([held], singles)
    return in_words(what, [str(i) for i in range(leaves)])


def test_the_order_of_additions() -> None:
    assert of_one(5, range(5)) == "((0 1) (2 (3 4)))"


@pytest.mark.parametrize("trial", range(20))
def test_any_spread_adds_up_in_the_same_order(trial: int, rng: np.random.Generator) -> None:
    leaves, ranks = int(rng.integers(1, 40)), int(rng.integers(1, 12))
    cut = int(rng.integers(0, ranks))  # two nodes, or one
    order = rng.permutation(ranks).tolist()
    members = tuple(tuple(sorted(part)) for part in (order[:cut], order[cut:]) if part)
    tree = Tree(leaves, members)
    held = [leaf for ranks in members for rank in ranks for leaf in tree.ranges[rank]]
    assert held == list(range(leaves))
    lengths = {len(tree.ranges[rank]) for rank in range(ranks)}
    assert max(lengths) - min(lengths) <= 1
    parts, words = [], []
    for node, ranks_of_node in enumerate(members):
        local = [part for rank in ranks_of_node for part in tree.of_rank(rank)]
        subtrees = tree.of_node(node)
        sums = tree.sums(subtrees, local)
        names = [of_one(leaves, part) for part in local]
        parts += subtrees
        words += [in_words(what, names) for what in sums]
    (what,) = tree.sums([range(leaves)], parts)
    assert in_words(what, words) == of_one(leaves, range(leaves))
    assert all(len(tree.of_rank(rank)) <= 2 * leaves.bit_length() for rank in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_powers_of_two_make_one_sum_a_rank(ranks: int) -> None:
    tree = Tree(16, (tuple(range(ranks)),))
    assert [len(tree.of_rank(rank)) for rank in range(ranks)] == [1] * ranks


def test_add(rng: np.random.Generator) -> None:
    arrays = list(rng.standard_normal((4, 5)))
    before = np.array(arrays)
    what: Sum = (0, ((1, 2), 3))
    scratch = np.empty((depth(what), 5))
    a, b, c, d = before
    np.testing.assert_array_equal(add(what, arrays, scratch), a + ((b + c) + d))
    np.testing.assert_array_equal(arrays, before)
    assert depth(what) == 3 and depth(0) == 0


@pytest.mark.parametrize("leaves", [0, -1, 1.5, float("nan")])
def test_a_number_that_cannot_be(leaves: float) -> None:
    with pytest.raises(InvalidArgument, match="microbatches="):
        Tree(leaves, ((0,),))  # type: ignore[arg-type]
