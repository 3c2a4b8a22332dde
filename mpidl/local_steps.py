"""Local SGD: several steps without other nodes, then the mean of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.strategies import AllReduce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.bucket import Bucket
    from mpidl.strategies import Strategy
    from mpidl.world import World


class LocalSteps:
    """Averages parameters every `every` steps, where gradients are averaged in smaller groups only.

    Local SGD (Stich 2019, algorithm 1). The group is this rank alone; with a strategy whose ranks
    share their parameters, it is this node: steps cost what they cost on one node. `world` and
    `strategy` are the group's. The optimizer's state, momentum say, stays each group's own.
    """

    def __init__(self, world: World, strategy: Strategy, every: int) -> None:
        self._whole_world, self._whole = world, strategy
        self.every = every
        self.strategy: Strategy
        if strategy.shared:
            self.world = world.on_node()
            self.strategy = strategy.on_node()  # type: ignore[attr-defined]
        else:
            self.world = world.alone()
            self.strategy = AllReduce(self.world)

    def average(self, buckets: Sequence[Bucket]) -> None:
        """Replace the parameters by their mean over ranks. Collective; spoils the gradients."""
        for flat in buckets:
            flat.grad[:] = flat.param
            for part, mean in self._whole.reduce(flat.grad, 1 / self._whole_world.size):
                flat.param[part] = mean
            self._whole.share(flat.param)
