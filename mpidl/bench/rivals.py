"""Other libraries that average over ranks, where they are installed. Imported in ranks only."""

from __future__ import annotations

import importlib
import os
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mpidl.bench import network
from mpidl.errors import MpidlError
from mpidl.strategies import horovod

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.world import World

HOROVOD_WARM_UP = 3  # calls


def join_gloo(world: World) -> str | None:
    """Make all ranks PyTorch's default process group, over Gloo; one thread each. Collective.

    Returns why not, where that cannot be.
    """
    if find_spec("torch") is None:
        return "torch is not installed"
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return "this torch was built without Gloo"
    try:
        address, interface = network.own(world)
    except MpidlError as error:  # on every rank
        return str(error)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    place, store = world.broadcast(address), None
    if world.rank == 0:
        store = distributed.TCPStore(place, 0, is_master=True, wait_for_workers=False)
    port = world.broadcast(store.port if store else 0)
    if store is None:
        store = distributed.TCPStore(place, port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    return None


def leave_gloo() -> None:
    """Undo `join_gloo`. Collective."""
    importlib.import_module("torch.distributed").destroy_process_group()


def try_horovod(world: World) -> str | None:
    """Return why Horovod cannot be measured, if so. Collective."""
    reason = horovod.missing()
    if reason is not None:
        return reason
    hvd: Any = importlib.import_module("horovod.torch")
    hvd.init()
    reason = horovod.differs(hvd, world)
    hvd.shutdown()
    return reason


@contextmanager
def horovod_at_work(tensor: Any) -> Iterator[None]:
    """Start Horovod, which averages `tensor` to get going, and stop it in the end. Collective."""
    hvd: Any = importlib.import_module("horovod.torch")
    hvd.init()
    try:
        for _ in range(HOROVOD_WARM_UP):
            horovod_average(tensor)
        yield
    finally:
        hvd.shutdown()


def horovod_average(tensor: Any) -> None:
    """Replace a torch `tensor` by its mean over ranks. Collective."""
    hvd: Any = importlib.import_module("horovod.torch")
    hvd.allreduce_(tensor, op=hvd.Average, name=f"tensor of {tensor.numel()}")


def horovod_optimizer(optimizer: Any, network: Any) -> Any:
    """Return a torch `optimizer` that averages the gradients of `network` first. Collective."""
    hvd: Any = importlib.import_module("horovod.torch")
    return hvd.DistributedOptimizer(optimizer, named_parameters=network.named_parameters())
