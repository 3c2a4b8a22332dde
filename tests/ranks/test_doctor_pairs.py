"""What `mpidl doctor --hosts` measures, with each rank as a host of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.cli import doctor_pairs
from tests.ranks.conftest import as_nodes

if TYPE_CHECKING:
    import mpidl


def test_every_pair_is_measured(world: mpidl.World) -> None:
    found = doctor_pairs.measure(as_nodes(world, lambda rank: rank), seconds=0.2)
    pairs = [(a, b) for a in range(world.size) for b in range(a + 1, world.size)]
    assert found["left"] == 0
    assert [(a, b) for a, b, _, _ in found["pairs"]] == pairs
    assert all(latency > 0 and rate > 0 for _, _, latency, rate in found["pairs"])
    assert len(found["clocks"]) == (0 if world.rank else world.size)
    for ahead, uncertainty in found["clocks"]:
        assert abs(ahead) <= uncertainty + 1e-4  # one clock
    assert [count > 0 for count in found["moved"]] == [world.size > 1] * world.size
    assert found["allreduce"]["seconds"] > 0
    assert len(found["names"]) == len(found["traffic"]) == world.size


def test_what_did_not_fit_in_is_left(world: mpidl.World) -> None:
    found = doctor_pairs.measure(as_nodes(world, lambda rank: rank), seconds=-1.0)
    assert found["pairs"] == []
    assert found["left"] == world.size * (world.size - 1) // 2
