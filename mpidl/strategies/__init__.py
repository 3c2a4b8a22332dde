"""Strategies: how the ranks average gradients, and who updates what.

`STRATEGIES` is the whole registry. Add a class of your own under a name, and use that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.errors import UnknownStrategy
from mpidl.strategies.allreduce import AllReduce
from mpidl.strategies.base import Strategy
from mpidl.strategies.parameter_server import ParameterServer
from mpidl.strategies.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.world import World

STRATEGIES: dict[str, Callable[[World], Strategy]] = {
    "allreduce": AllReduce,
    "parameter_server": ParameterServer,
    "ring": Ring,
}

__all__ = ["STRATEGIES", "AllReduce", "ParameterServer", "Ring", "Strategy", "make"]


def make(strategy: str | Strategy, world: World) -> Strategy:
    """Return the strategy of this name, made for `world`; an instance is returned as it is.

    Collective. Raises UnknownStrategy on every rank for a name that any rank does not know, and
    RankMismatch where the ranks name different ones.
    """
    name = strategy if isinstance(strategy, str) else None
    with world.together():
        if name is not None and name not in STRATEGIES:
            known = ", ".join(sorted(STRATEGIES))
            raise UnknownStrategy(f"unknown strategy {name!r}; known are: {known}")
    world.same(name or type(strategy).__name__, "strategy")
    return STRATEGIES[name](world) if name is not None else strategy  # type: ignore[return-value]
