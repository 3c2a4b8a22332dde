"""Means over a data set that the ranks share."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

from mpidl import exact
from mpidl.data.dataset import length
from mpidl.errors import InvalidArgument, NonFinite
from mpidl.nn.predict import evaluating
from mpidl.refuse import whole
from mpidl.trace.ranges import range as named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpidl.data import Batches, Dataset
    from mpidl.loss_sum import LossSum
    from mpidl.nn import Module
    from mpidl.parallel import DataParallel
    from mpidl.trainer import Metric
    from mpidl.world import World


def batch_of(dataset: Dataset, batch_size: int) -> int:
    """Return the batch to evaluate with, at most all samples. Raises InvalidArgument for none."""
    n = length(dataset, "evaluate")
    if n == 0:
        raise InvalidArgument("evaluate: the data set is empty")
    return min(whole("evaluate: batch_size", batch_size, 1), n)


@named("evaluation")
def means(
    world: World, model: Module, functions: Mapping[str, Metric], batches: Batches
) -> dict[str, float]:
    """Return the mean of each function (output, target) over all samples. Collective."""
    sums: dict[str, list[float]] = {name: [] for name in functions}  # of each call of the model
    with evaluating(model):
        for x, y in batches:
            if len(x) == 0:  # other ranks have samples; a mean over none may be NaN
                continue
            output = model(x)
            for name, function in functions.items():
                sums[name].append(float(function(output, y)) * len(x))
    samples = len(batches.dataset)
    return {name: mean_of(world, found, samples) for name, found in sums.items()}


def mean_of(world: World, sums: Sequence[float], samples: int) -> float:
    """Return the mean over `samples`, given sums over some of them. Collective.

    They are added up without error: the same bits, whoever made which of them.
    """
    return exact.total(chain(*world.gather(sums))) / samples


def tell_loss(replica: DataParallel, losses: LossSum, batches: Batches) -> None:
    """Raise NonFinite on every rank, with the parameter if one is no number. Collective."""
    replica.audit.look(replica.steps)
    loss, step = exact.total(losses.parts()), losses.spoiled
    since = "" if step is None else f", from step {step} of {len(batches)} on"
    problem = NonFinite(f"epoch {batches.epoch + 1}: the loss is {loss}{since}")
    replica.world.agree(None if math.isfinite(loss) else problem)
