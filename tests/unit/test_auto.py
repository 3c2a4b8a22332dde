"""The strategy "auto": what it chooses for which job, and the reasons it gives."""

from __future__ import annotations

from typing import Any

import pytest

from mpidl.strategies import STRATEGIES, auto
from mpidl.world import World

LARGE = 1 << 30


def world(size: int, nodes: int = 1, local_size: int | None = None) -> World:
    """Return a world as one of its ranks sees it, without MPI."""
    mpi: Any = None
    return World(
        MPI=mpi,
        comm=mpi,
        rank=size - 1,
        size=size,
        local_rank=0,
        local_size=local_size or size // nodes,
        node=nodes - 1,
        nodes=nodes,
        members=(),
        local=mpi,
    )


@pytest.mark.parametrize("size", [2, 3, 128])
def test_the_ranks_of_one_node_share_memory(size: int) -> None:
    name, why = auto.choose(world(size), LARGE, on_device=False)
    assert (name, why) == ("hierarchical", "one node, whose ranks share memory")


@pytest.mark.parametrize(
    ("where", "on_device", "why"),
    [
        pytest.param(world(1), False, "one rank, nothing to average", id="alone"),
        pytest.param(world(1), True, "one rank, nothing to average", id="alone, on the GPU"),
        pytest.param(world(4), True, "the model is on the GPU", id="GPU"),
        pytest.param(world(4, 2), True, "the model is on the GPU", id="GPUs of 2 nodes"),
    ],
)
def test_elsewhere_it_is_allreduce(where: World, on_device: bool, why: str) -> None:
    assert auto.choose(where, LARGE, on_device=on_device) == ("allreduce", why)


@pytest.mark.parametrize("where", [world(4, 2), world(3, 3), world(5, 2, 4)])
def test_all_ranks_of_a_node_send_to_other_nodes(where: World) -> None:
    name, why = auto.choose(where, LARGE, on_device=False)
    assert (name, why) == (
        "hierarchical",
        f"{where.nodes} nodes, and all ranks of a node send at once",
    )
    name, why = auto.choose(where, auto.SMALL_BYTES_BETWEEN_NODES - 1, on_device=False)
    assert name == "allreduce"
    assert why.startswith(f"{where.nodes} nodes, but only ")


def test_few_parameters_are_not_worth_the_waiting() -> None:
    name, why = auto.choose(world(2), auto.SMALL_BYTES - 1, on_device=False)
    assert name == "allreduce"
    assert why == f"one node, but only {(auto.SMALL_BYTES - 1) / 1e3:.1f} kB of parameters"
    assert auto.choose(world(2), auto.SMALL_BYTES, on_device=False)[0] == "hierarchical"


def test_all_ranks_choose_alike() -> None:
    """Though they know of themselves only what they are on their own node."""
    views = [world(5, 2, local_size) for local_size in (4, 1)]
    assert len({auto.choose(view, LARGE, on_device=False) for view in views}) == 1


def test_it_chooses_what_there_is() -> None:
    assert auto.FALLBACK in STRATEGIES
    for where in (world(1), world(2), world(2, 2)):
        assert auto.choose(where, LARGE, on_device=False)[0] in STRATEGIES
