"""GPUs compared over the ranks of a node. What they are called is made up."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest

from mpidl.binding import BindingWarning, check_gpus
from tests.ranks.conftest import as_nodes

if TYPE_CHECKING:
    import mpidl


def told(world: mpidl.World, gpu: str | None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_gpus(world, gpu)
    assert all(warning.category is BindingWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.fixture(autouse=True)
def _tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_OVERSUBSCRIBE", "0")


def test_one_gpu_for_all_is_told_by_one_rank_of_a_node(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told(world, "0000:3B:00.0 aa")
    if world.local_rank == 0 and world.local_size > 1:
        (text,) = found
        assert f"on {world.MPI.Get_processor_name()} ranks 0, 1" in text
        assert "share GPU 0000:3B:00.0: " in text
    else:
        assert found == []
    assert told(world, f"0000:3B:00.0 {world.rank}") == []
    assert told(world, None) == []
    monkeypatch.setenv("MPIDL_OVERSUBSCRIBE", "1")
    assert told(world, "0000:3B:00.0 aa") == []


def test_gpus_of_different_nodes_are_different(world: mpidl.World) -> None:
    apart = as_nodes(world, lambda rank: rank)
    assert told(apart, "0000:3B:00.0 aa") == []
