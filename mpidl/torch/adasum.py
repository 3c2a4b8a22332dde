"""An optimizer under Adasum: each rank makes its own step, and the steps are combined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpidl.errors import InvalidArgument
from mpidl.torch.ops import allreduce_async_, synchronize
from mpidl.torch.reduce_op import Adasum

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.torch.averages import Averages


class AdasumSteps:
    """What an optimizer gets besides its own.

    Maleki et al. 2020, "Scaling Distributed Training with Adaptive Summation": for optimizers
    with state, what is combined is the change of the parameters, not the gradients.
    """

    _averages: Averages

    def synchronize(self) -> None:
        """Do nothing: gradients stay this rank's own."""

    def skip_synchronize(self) -> Any:
        """Raise InvalidArgument: the step itself is what the ranks combine."""
        raise InvalidArgument("skip_synchronize: cannot be had with op=Adasum")

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Do nothing: nothing travels before `step`."""

    def forget(self) -> None:
        """Do nothing: nothing is on its way between steps."""

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Make this rank's step, and replace it by what all ranks' steps make. Collective."""
        averages = self._averages
        groups = self.param_groups  # type: ignore[attr-defined]
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        starts = [] if averages.alone else [p.detach().clone() for p in params]
        found = super().step(closure, **options)  # type: ignore[misc]
        if averages.alone:
            return found
        averages.watch(groups, begin=False)
        with torch.no_grad():
            sent = []
            for param, start in zip(params, starts, strict=True):
                change, context = averages.compression.compress(param - start)
                name = averages.names[id(param)]
                handle = allreduce_async_(
                    change, name=name, op=Adasum, process_set=averages.process_set
                )
                sent.append((handle, context))
            for param, start, (handle, context) in zip(params, starts, sent, strict=True):
                change = averages.compression.decompress(synchronize(handle), context)
                param.copy_(start + change)
        return found

    step.hooked = True  # type: ignore[attr-defined]  # hooks are called in torch's own
