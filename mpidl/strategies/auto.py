"""The strategy "auto": what to take where, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpidl.world import World

SMALL_BYTES = 1 << 12  # measured: below, MPI_Allreduce takes less time
SMALL_BYTES_BETWEEN_NODES = 1 << 16
FALLBACK = "sharded"  # where a node's memory cannot be shared: it moves as few bytes, and owns 1/P
ON_DEVICE = ("hierarchical", "nccl", "allreduce")  # what is tried for models on GPUs
FALLBACK_ON_DEVICE = "allreduce"  # where GPUs do not reach each other's memory


def choose(world: World, size: int, *, on_device: bool) -> tuple[str, str]:
    """Return the name of a strategy, and the reason, for `size` bytes of parameters.

    The same on every rank. Not collective. On GPUs what is measured takes its place.
    """
    if world.size == 1:
        return "allreduce", "one rank, nothing to average"
    if on_device:
        return "allreduce", "the model is on the GPU"
    nodes = "one node" if world.nodes == 1 else f"{world.nodes} nodes"
    if size < (SMALL_BYTES if world.nodes == 1 else SMALL_BYTES_BETWEEN_NODES):
        return "allreduce", f"{nodes}, but only {size / 1e3:.1f} kB of parameters"
    if world.nodes == 1:
        return "hierarchical", "one node, whose ranks share memory"
    return "hierarchical", f"{nodes}, and all ranks of a node send at once"
