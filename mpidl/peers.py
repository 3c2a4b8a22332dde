"""GPU memory that the ranks of a node map, each other's, and the order of their work on it.

By CUDA IPC (of the CUDA Runtime API: Device Management): between GPUs that reach each other's
memory, and between processes on one GPU.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import shared
from mpidl.array import gpu_name, out_of_memory
from mpidl.errors import MpidlError, NoPeerAccess, OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.world import World

BLOCK = 1 << 21  # what the driver maps: memory in the same block as ours would be mapped with it
ALIGNMENT = 512  # as CuPy's pool
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

_leaving: list[tuple[int, Any]] = []  # memory of ours, and who has unmapped it
_events: list[Any] = []  # of ours, for ever: peers may have them open


@dataclass(frozen=True)
class Region:
    """The memory of one rank, as this rank maps it. It lives as long as any array in it."""

    address: int
    size: int

    def array(self, start: int, size: int, dtype: Any) -> Array:
        """Return the array (size,) that begins at byte `start`; not initialized."""
        cupy = sys.modules["cupy"]
        device = cupy.cuda.runtime.getDevice()  # that of whose kernels use it, wherever it lies
        memory = cupy.cuda.UnownedMemory(self.address, self.size, self, device)
        pointer = cupy.cuda.MemoryPointer(memory, start)
        made: Array = cupy.ndarray((size,), dtype, pointer)
        return made


def allocate(world: World, size: int, what: str) -> list[Region]:
    """Return a zeroed region of each rank of this node, by local rank. Collective.

    `size` is that of this rank's in bytes; ranks may want different sizes. `what` says in an error
    what it is for.

    Raises on every rank of the world OutOfDeviceMemory where a GPU has not so much, and
    NoPeerAccess where a rank cannot map another one's memory.
    """
    _sweep()
    runtime = sys.modules["cupy"].cuda.runtime
    size = max(1, -(-size // BLOCK)) * BLOCK
    address, handle = 0, b""
    problem: MpidlError | None = None
    try:
        address = _malloc(size, what)
        runtime.memset(address, 0, size)
        runtime.deviceSynchronize()  # peers may look at it at once
        handle = bytes(runtime.ipcGetMemHandle(address))
    except OutOfDeviceMemory as error:
        problem = error
    except runtime.CUDARuntimeError as error:
        problem = NoPeerAccess(f"GPU {gpu_name()} gives no handle of its memory: {error}")
    found = world.local.allgather((handle, size, gpu_name()))
    addresses = [0] * world.local_size
    if all(there for there, _, _ in found):
        addresses, problem = _mapped(world, [(h, gpu) for h, _, gpu in found], address)
    try:
        world.agree(problem)
        marks = _marks(world)
    except Exception:  # on every rank; what peers have mapped, they are unmapping
        for i, there in enumerate(addresses):
            if there and i != world.local_rank:
                runtime.ipcCloseMemHandle(there)
        world.local.Barrier()
        if address:
            runtime.free(address)
        raise
    regions = []
    for i, there in enumerate(addresses):
        region = Region(there, found[i][1])
        own = i == world.local_rank
        end = partial(_leave, there, marks[i]) if own else partial(_unmap, there, marks[i], world)
        weakref.finalize(region, end).atexit = False
        regions.append(region)
    return regions


def _malloc(size: int, what: str) -> int:
    """Return memory of the driver's, past CuPy's pool: handles are of whole allocations."""
    cupy = sys.modules["cupy"]
    runtime = cupy.cuda.runtime
    for last in (False, True):
        try:
            return int(runtime.malloc(size))
        except runtime.CUDARuntimeError as error:  # noqa: PERF203  # twice at most
            if error.status != OUT_OF_MEMORY:
                raise
            if last:
                raise out_of_memory(size, what) from error
            cupy.get_default_memory_pool().free_all_blocks()  # what the pool keeps, and nobody uses
    raise AssertionError


def _mapped(
    world: World, found: list[tuple[bytes, str]], own: int
) -> tuple[list[int], NoPeerAccess | None]:
    """Return the address of each rank's memory here, 0 where it cannot be, and a problem."""
    runtime = sys.modules["cupy"].cuda.runtime
    addresses, problem = [0] * world.local_size, None
    members = world.members[world.node]
    for i, (handle, gpu) in enumerate(found):
        if i == world.local_rank:
            addresses[i] = own
            continue
        try:
            addresses[i] = int(runtime.ipcOpenMemHandle(handle))
        except runtime.CUDARuntimeError as error:
            problem = problem or NoPeerAccess(
                f"GPU {gpu_name()} cannot map the memory of rank {members[i]} on GPU {gpu}: {error}"
            )
    return addresses, problem


def _marks(world: World) -> Any:
    """Return bytes (owner, rank) in host memory, all 0: whether the rank has unmapped it."""
    size = world.local_size
    memory = shared.allocate(world, size * size)
    return np.ndarray((size, size), np.uint8, memory)


def _unmap(address: int, marks: Any, world: World) -> None:
    """Give a peer's memory back, and say so."""
    sys.modules["cupy"].cuda.runtime.ipcCloseMemHandle(address)
    marks[world.local_rank] = 1


def _leave(address: int, marks: Any) -> None:
    """Free our memory when no peer maps it any more: before, CUDA does not define what happens."""
    _leaving.append((address, marks))
    _sweep()


def _sweep() -> None:
    runtime = sys.modules["cupy"].cuda.runtime
    for waiting in list(_leaving):
        if np.count_nonzero(waiting[1]) >= len(waiting[1]) - 1:  # all but the owner
            _leaving.remove(waiting)
            runtime.free(waiting[0])


class Order:
    """Lets the streams of a node's ranks wait for each other, and no rank for its GPU. Collective.

    An event stands for all work on its rank's stream up to `record`. A rank that knows, by a
    message on the host, that a peer has recorded, may `wait`: what follows on its own stream then
    follows what the peer's event stands for.
    """

    def __init__(self, world: World) -> None:
        cupy = sys.modules["cupy"]
        runtime = cupy.cuda.runtime
        self._own = cupy.cuda.Event(disable_timing=True, interprocess=True)
        _events.append(self._own)
        problem, self._peers = None, []
        try:
            handle = bytes(runtime.ipcGetEventHandle(self._own.ptr))
        except runtime.CUDARuntimeError as error:
            handle, problem = b"", NoPeerAccess(f"GPU {gpu_name()} gives no handle: {error}")
        handles = world.local.allgather(handle)
        try:
            if all(handles):
                self._peers = list(_opened(handles, world.local_rank))
        except runtime.CUDARuntimeError as error:
            problem = NoPeerAccess(f"GPU {gpu_name()} cannot open events of its peers: {error}")
        world.agree(problem)

    def record(self) -> None:
        """Mark all that the current stream has been given. Not collective."""
        self._own.record(sys.modules["cupy"].cuda.get_current_stream())

    def wait(self) -> None:
        """Let the current stream wait for what all peers have recorded. Not collective."""
        cupy = sys.modules["cupy"]
        stream = cupy.cuda.get_current_stream().ptr
        for event in self._peers:
            cupy.cuda.runtime.streamWaitEvent(stream, event)


def _opened(handles: list[bytes], own: int) -> Iterator[int]:
    for i, handle in enumerate(handles):
        if i != own:
            yield int(sys.modules["cupy"].cuda.runtime.ipcOpenEventHandle(handle))


def stride_of(size: int, dtype: Any) -> int:
    """Return the bytes from one array (size,) to the next in a region."""
    return -(-size * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
