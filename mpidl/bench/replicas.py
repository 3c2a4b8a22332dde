"""Models with what trains them across ranks, as `mpidl bench step` compares them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import functional, nn, optim
from mpidl.array import synchronize, to_device, to_numpy
from mpidl.bench import rivals
from mpidl.bench.engine_models import RATE, batch, model
from mpidl.parallel import DataParallel

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.array import Array
    from mpidl.strategies import Strategy
    from mpidl.world import World

MOMENTUM = 0.9


@dataclass(frozen=True)
class Replica:
    """One rank's part in one way to train a model. All start from the same values.

    A step is `backward` and then `update`, on a batch of the rank's own. Collective.
    """

    method: str
    base: str  #: the method that makes the same step without communication
    strategy: str | None  #: which is at work
    rows: int  #: the samples of this rank's batch
    backward: Callable[[], None]
    update: Callable[[], None]
    values: Callable[[], list[Array]]  #: the parameters
    close: Callable[[], None]
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext  #: in which steps are made

    def step(self) -> None:
        """Make one step. Collective."""
        self.backward()
        self.update()


def in_mpidl(
    method: str,
    strategy: str | Strategy,
    world: World,
    name: str,
    rows: int,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> Replica:
    """Return the model `name` in this engine; `seed` tells the ranks' batches apart. Collective.

    `options` are for `DataParallel`. On a GPU a step ends when the GPU has done it.
    """
    x, y = (to_device(value, device) for value in batch(name, rows, seed))
    nn.seed(0)
    network = model(name).to(device)
    optimizer = optim.SGD(RATE, momentum=MOMENTUM)
    parallel = DataParallel(network, optimizer, strategy, world=world, **options)

    def update() -> None:
        parallel.step()
        synchronize(x)

    return Replica(
        method,
        "local",
        parallel.choice.name,
        rows,
        backward=lambda: functional.cross_entropy(network(x), y).backward(),
        update=update,
        values=lambda: [to_numpy(p.data) for p in network.parameters()],
        close=parallel.close,
    )


def forget() -> None:
    """Do nothing: what is not used any more goes by itself."""


def in_torch(
    method: str,
    name: str,
    rows: int,
    seed: int = 0,
    *,
    parallel: str | None = None,
    base: str = "torch_local",
    models: Any = None,
) -> Replica:
    """Return the model `name` in PyTorch, on one thread.

    `parallel` is None, "ddp", "horovod", or a strategy of `mpidl.torch.DataParallel`. Collective
    then; with "ddp" after `rivals.join_gloo`; with "horovod" after `rivals.try_horovod`: its
    thread, which never rests, runs while steps are made. `models` is a module with functions
    `model` and `batch`, by default `engine_torch`.
    """
    import torch

    from mpidl.bench import engine_torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = models or engine_torch
    x, y = map(torch.from_numpy, models.batch(name, rows, seed))
    network = models.model(name)
    forward: torch.nn.Module = network
    optimizer: Any = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext
    strategy: str | None = None
    close: Callable[[], None] = forget
    if parallel == "ddp":
        forward = torch.nn.parallel.DistributedDataParallel(network)
    elif parallel == "horovod":
        at_work = partial(rivals.horovod_at_work, torch.ones(1))
        with at_work():
            optimizer = rivals.horovod_optimizer(optimizer, network)
    elif parallel is not None:
        from mpidl.torch.parallel import DataParallel as TorchDataParallel

        forward = TorchDataParallel(network, optimizer, parallel)
        strategy, close = forward.choice.name, forward.close

    def backward() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(x), y).backward()

    return Replica(
        method,
        base,
        strategy,
        rows,
        backward=backward,
        update=optimizer.step,
        values=lambda: [np.asarray(p.detach()) for p in network.parameters()],
        close=close,
        at_work=at_work,
    )
