"""What an update is made of: average, clip, update the owned parts, publish them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mpidl.array import blocks
from mpidl.errors import NonFiniteGradient
from mpidl.optim.base import Layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpidl.array import Array
    from mpidl.bucket import Bucket
    from mpidl.optim import Optimizer
    from mpidl.optim.clip import Clip
    from mpidl.strategies import Strategy
    from mpidl.world import World


class Update:
    """Updates `buckets`, each with the optimizer of its group, and keeps the optimizers' states."""

    def __init__(
        self,
        world: World,
        strategy: Strategy,
        buckets: Sequence[Bucket],
        optimizers: Sequence[Optimizer],
        clip: Clip,
    ) -> None:
        self.world, self.strategy, self.buckets = world, strategy, buckets
        self.optimizers, self.clip = optimizers, clip
        self.states: list[dict[str, Array]] = []  #: of the owned parts; known at the first update
        self._layers: list[Layers] = []

    def make(self, weight: float, step: int) -> None:
        """Average the gradients, this rank's times `weight`, and update. Collective.

        Raises NonFiniteGradient on every rank, before anything is updated, where a norm is to be
        clipped that is not finite.
        """
        reduced = ((flat, self.strategy.reduce(flat.grad, weight)) for flat in self.buckets)
        if self.clip.norm is None:
            self._apply(reduced, 1.0, step)
        else:  # the norm is over all buckets
            parts = list(reduced)
            self._apply(parts, self._shorten(parts, step), step)

    def _shorten(self, reduced: Sequence[tuple[Bucket, slice]], step: int) -> float:
        """Return the factor that brings the whole gradient to the norm allowed. Collective."""
        squares = sum(self.clip.measure(flat.grad[owned]) for flat, owned in reduced)
        norm = math.sqrt(self.strategy.total([squares])[0])
        if not math.isfinite(norm):
            error = f"step {step}: the norm of the averaged gradient is {norm}"
            self.world.agree(NonFiniteGradient(error))
        return self.clip.factor(norm)

    def _apply(self, reduced: Iterable[tuple[Bucket, slice]], factor: float, step: int) -> None:
        """Clip, update and publish the owned part of each bucket. Collective."""
        clips = factor != 1 or self.clip.bounds_late
        for i, (flat, owned) in enumerate(reduced):
            param, grad = flat.param[owned], flat.grad[owned]
            optimizer = self.optimizers[flat.group]
            if i == len(self.states):
                self.states.append(optimizer.init(param))
                self._layers.append(Layers(flat.parts(owned), self.strategy.total))
            # what is clipped is updated while in cache
            pieces = blocks(param) if clips and optimizer.elementwise else (slice(None),)
            for part in pieces:
                if clips:
                    self.clip.finish(grad[part], factor)
                state = {name: array[part] for name, array in self.states[i].items()}
                optimizer.update(param[part], grad[part], state, step, self._layers[i])
            self.strategy.share(flat.param)
