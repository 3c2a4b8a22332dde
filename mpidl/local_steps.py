"""Local SGD: several steps without other nodes, then the mean of the parameters."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpidl import clock
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.strategies import Adasum, AllReduce

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpidl.bucket import Bucket
    from mpidl.strategies import Strategy
    from mpidl.world import World


class LocalSteps:
    """Averages parameters every `every` steps, where gradients are averaged in smaller groups only.

    Local SGD (Stich 2019, algorithm 1). The group is this rank alone; with a strategy whose ranks
    share their parameters, it is this node: steps cost what they cost on one node. `world` and
    `strategy` are the group's. The optimizer's state, momentum say, stays each group's own.

    Raises InvalidArgument for a strategy that does not give the mean of parameters.
    """

    def __init__(self, world: World, strategy: Strategy, every: int) -> None:
        codec = getattr(strategy, "codec", None)
        if codec is not None or isinstance(strategy, Adasum):
            what = strategy if codec is None else codec
            raise InvalidArgument(
                f"local_steps={every} with {type(what).__name__}: it is for gradients, and local "
                "steps need the mean of parameters"
            )
        self._whole_world, self._whole = world, strategy
        self.every, self._calls = every, 0  # since the last average
        self.strategy: Strategy
        if strategy.shared:
            self.world = world.on_node()
            self.strategy = strategy.on_node()  # type: ignore[attr-defined]
        else:
            self.world = world.alone()
            self.strategy = AllReduce(self.world)

    @contextmanager
    def counted(self, buckets: Sequence[Bucket]) -> Iterator[None]:
        """Count a step, also one that fails, and average after it if it is time. Collective then.

        So groups stay in step, whatever the errors of their own that they go on after.
        """
        problem: MpidlError | None = None
        try:
            yield
        except MpidlError as error:
            problem = error
        self._calls += 1
        if self._calls == self.every:
            self.average(buckets)
        if problem is not None:
            raise problem

    @clock.counted(clock.REDUCE)
    def average(self, buckets: Sequence[Bucket]) -> None:
        """Replace the parameters by their mean over ranks. Collective; spoils the gradients."""
        self._calls = 0
        with self._whole_world.mark.enter("average of parameters"):
            for flat in buckets:
                flat.grad[:] = flat.param
                for part, mean in self._whole.reduce(flat.grad, 1 / self._whole_world.size):
                    flat.param[part] = mean
                    self._whole_world.mark.progress += 1
                self._whole.share(flat.param)

    @property
    def due(self) -> bool:
        """Whether there were steps since the last average; the same on all ranks."""
        return self._calls > 0
