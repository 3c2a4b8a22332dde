"""Strategies: how the ranks average gradients, and who updates what.

`STRATEGIES` is the whole registry. Add a class of your own under a name, and use that name.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from mpidl.errors import InvalidArgument, UnknownStrategy
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

    Collective. Raises on every rank UnknownStrategy for a name that any rank does not know,
    InvalidArgument for a class, and RankMismatch where names or options differ between ranks.
    """
    with world.together():
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            known = ", ".join(sorted(STRATEGIES))
            raise UnknownStrategy(f"unknown strategy {strategy!r}; known are: {known}")
        if isinstance(strategy, type):
            raise InvalidArgument(f"strategy: expected a name or {strategy.__name__}(world, ...)")
    world.same(strategy if isinstance(strategy, str) else _describe(strategy), "strategy")
    return STRATEGIES[strategy](world) if isinstance(strategy, str) else strategy


def _describe(strategy: Strategy) -> str:
    """Name the class and the options it was made with; not its own state, such as a rank."""
    kept = getattr(strategy, "__dict__", {})
    options = [name for name in inspect.signature(type(strategy)).parameters if name in kept]
    plain = [
        f"{name}={kept[name]}" for name in options if isinstance(kept[name], (int, float, str))
    ]
    return f"{type(strategy).__name__}({', '.join(plain)})"
