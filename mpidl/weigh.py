"""The one sum that ranks make in each step besides their gradients'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.errors import RankMismatch
from mpidl.exact import all_equal

if TYPE_CHECKING:
    from mpidl.errors import MpidlError
    from mpidl.world import World


def weigh(
    world: World,
    step: str,
    weight: float,
    problem: MpidlError | None,
    stops: bool,
    overflow: bool,
) -> tuple[float, bool, bool]:
    """Return the samples of all ranks, and whether any rank stops, or has an overflow. Collective.

    Raises on every rank the problem that any rank has; and RankMismatch where this rank sees that
    not all have made as many collective calls, by itself: where the others are nobody knows.
    """
    calls = world.mark.calls & 0xFFFF
    sums = world.sum([weight, problem is not None, stops, overflow, calls, calls * calls])
    if not all_equal(world.size, *sums[4:]):
        raise RankMismatch(
            f"{step}: a rank has made more collective calls than others, or fewer: "
            "MPIDL_CHECK=collectives tells where they part"
        )
    if sums[1]:
        world.agree(problem)
    return float(sums[0]), bool(sums[2]), bool(sums[3])
