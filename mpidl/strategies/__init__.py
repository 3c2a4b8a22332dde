"""Strategies: how the ranks average gradients, and who updates what.

`STRATEGIES` is the whole registry. Add a class of your own under a name, and use that name.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl import shared
from mpidl.errors import InvalidArgument, NoSharedMemory, UnknownStrategy
from mpidl.strategies import auto
from mpidl.strategies.allreduce import AllReduce
from mpidl.strategies.base import Strategy
from mpidl.strategies.hierarchical import Hierarchical
from mpidl.strategies.parameter_server import ParameterServer
from mpidl.strategies.ring import Ring
from mpidl.strategies.sharded import Sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.world import World

STRATEGIES: dict[str, Callable[[World], Strategy]] = {
    "allreduce": AllReduce,
    "hierarchical": Hierarchical,
    "parameter_server": ParameterServer,
    "ring": Ring,
    "sharded": Sharded,
}

__all__ = [
    "STRATEGIES",
    "AllReduce",
    "Choice",
    "Hierarchical",
    "ParameterServer",
    "Ring",
    "Sharded",
    "Strategy",
    "make",
]


@dataclass(frozen=True)
class Choice:
    """A strategy, and why it is this one."""

    strategy: Strategy
    name: str  #: in STRATEGIES; of one that was given, its class
    why: str


def make(
    strategy: str | Strategy, world: World, size: int = 0, *, on_device: bool = False
) -> Choice:
    """Return the strategy of this name, made for `world`; an instance is returned as it is.

    Collective. "auto" chooses by topology, by the `size` of all parameters in bytes, and by
    whether they are `on_device`. Where the ranks of a node cannot share memory, "hierarchical"
    becomes "sharded", with a warning that says what to change.

    Raises on every rank UnknownStrategy for a name that any rank does not know, InvalidArgument
    for a class, and RankMismatch where names or options differ between ranks.
    """
    with world.together():
        if isinstance(strategy, str) and strategy not in (*STRATEGIES, "auto"):
            known = ", ".join(sorted([*STRATEGIES, "auto"]))
            raise UnknownStrategy(f"unknown strategy {strategy!r}; known are: {known}")
        if isinstance(strategy, type):
            raise InvalidArgument(f"strategy: expected a name or {strategy.__name__}(world, ...)")
    world.same(strategy if isinstance(strategy, str) else _describe(strategy), "strategy")
    if not isinstance(strategy, str):
        return Choice(strategy, type(strategy).__name__, "as given")
    name, why = strategy, "as asked for"
    if strategy == "auto":
        name, why = auto.choose(world, size, on_device=on_device)
    try:
        made = STRATEGIES[name](world)
        if made.shared:  # a trial: as much as will be needed, though not yet used
            shared.allocate(world, max(1, size * (1 + world.local_size)))
        return Choice(made, name, why)
    except NoSharedMemory as error:  # on every rank
        why = f"in place of {name}: {error}"
        if world.rank == 0:
            warnings.warn(f'strategy "{auto.FALLBACK}" {why}', RuntimeWarning, stacklevel=3)
        return Choice(STRATEGIES[auto.FALLBACK](world), auto.FALLBACK, why)


def _describe(strategy: Strategy) -> str:
    """Name the class and the options it was made with; not its own state, such as a rank."""
    kept = getattr(strategy, "__dict__", {})
    options = [name for name in inspect.signature(type(strategy)).parameters if name in kept]
    plain = [
        f"{name}={kept[name]}" for name in options if isinstance(kept[name], (int, float, str))
    ]
    return f"{type(strategy).__name__}({', '.join(plain)})"
