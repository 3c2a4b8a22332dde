"""The world: who is where, and raising together."""

from __future__ import annotations

import numpy as np
import pytest

import mpidl
from mpidl.errors import BatchTooLarge, InvalidArgument, RankMismatch


def test_ranks_and_nodes(world: mpidl.World) -> None:
    assert world.gather(world.rank) == list(range(world.size))
    assert (world.local_rank, world.local_size) == (world.rank, world.size)  # one machine
    assert (world.node, world.nodes) == (0, 1)


def test_init_is_idempotent(world: mpidl.World) -> None:
    assert mpidl.init() is world


def test_communicator_is_private(world: mpidl.World) -> None:
    """A message of the user's own on COMM_WORLD never meets one of ours."""
    user, right, left = world.MPI.COMM_WORLD, (world.rank + 1) % world.size, world.rank - 1
    request = user.isend("the user's", right, tag=0)
    ours = world.comm.sendrecv("ours", right, sendtag=0, source=left % world.size)
    theirs = user.recv(source=left % world.size, tag=0)
    request.wait()
    assert (ours, theirs) == ("ours", "the user's")


def test_sum_broadcast_gather(world: mpidl.World, own: np.random.Generator) -> None:
    value = float(own.standard_normal())
    values = world.gather(value)
    assert values[world.rank] == value
    total = world.sum([value, 1])
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, [sum(values), world.size], rtol=1e-12)
    root = world.size - 1
    assert world.broadcast({"x": value}, root) == {"x": values[root]}


def test_nobody_has_a_problem(world: mpidl.World) -> None:
    world.agree(None)
    world.same("x", "letter")
    with world.together():
        pass


@pytest.mark.parametrize("culprit", ["first", "last", "all"])
def test_agree_raises_the_same_on_every_rank(world: mpidl.World, culprit: str) -> None:
    mine = {"first": world.rank == 0, "last": world.rank == world.size - 1, "all": True}[culprit]
    with pytest.raises(BatchTooLarge, match="too much") as caught:
        world.agree(BatchTooLarge("too much") if mine else None)
    assert caught.value.collective
    messages = set(world.gather(str(caught.value)))
    assert len(messages) == 1
    if world.size > 1:
        who = {"first": "rank 0:", "last": f"rank {world.size - 1}:", "all": "every rank:"}
        assert str(caught.value).startswith(who[culprit])


def test_class_of_the_lowest_rank_wins(world: mpidl.World) -> None:
    error = InvalidArgument("mine") if world.rank == 0 else BatchTooLarge("theirs")
    with pytest.raises(InvalidArgument, match="mine"):
        world.agree(error)


def test_together_raises_everywhere(world: mpidl.World) -> None:
    def fail_on_the_last() -> None:
        if world.rank == world.size - 1:
            raise InvalidArgument("only here")

    with pytest.raises(InvalidArgument, match="only here"), world.together():
        fail_on_the_last()


def test_same_names_the_one_that_differs(world: mpidl.World) -> None:
    if world.size == 1:
        world.same("alone", "letter")
        return
    with pytest.raises(RankMismatch, match="rank 1: letter: b, but rank 0 has a"):
        world.same("b" if world.rank == 1 else "a", "letter")


def test_an_error_that_takes_other_arguments(world: mpidl.World) -> None:
    with pytest.raises(RankMismatch, match=r"(every rank|rank 0): 7 of 3"):
        world.agree(Odd(7, 3))


class Odd(mpidl.MpidlError):
    def __init__(self, found: int, expected: int) -> None:
        super().__init__(f"{found} of {expected}")
