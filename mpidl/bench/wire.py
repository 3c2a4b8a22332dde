"""What the wire between nodes carries, and how soon it could have carried an average."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from mpidl.bench.timing import quartiles

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.world import World

TURNS = 5
MIN_SECONDS = 0.25  # of one message: a link's burst is small beside it
MIN_BYTES, MAX_BYTES = 1 << 20, 1 << 28
TAG = 7


def seconds(nbytes: int, nodes: int, rate: float) -> float:
    """Return how long a node's wire of `rate` bits a second takes to average `nbytes` bytes.

    2 (N-1)/N of them leave each of N nodes, and as many come in: the least possible (Patarasuk and
    Yuan 2009, section 2). Both directions are at work at once.
    """
    return nbytes * 2 * (nodes - 1) / nodes * 8 / rate


def measure(world: World) -> tuple[float, float, float]:
    """Return the bits a second between the first two nodes: lower quartile, median, upper.

    The same on every rank. Collective. Long messages, from one node's first rank to the other's;
    of the two directions, the slower one.
    """
    pair = world.members[0][0], world.members[1][0]
    buffer = np.ones(MIN_BYTES, np.uint8)
    while _seconds(world, pair, buffer) < MIN_SECONDS and buffer.size < MAX_BYTES:
        buffer = np.ones(2 * buffer.size, np.uint8)
    taken: dict[tuple[int, int], list[float]] = {pair: [], pair[::-1]: []}
    for _ in range(TURNS):
        for direction, values in taken.items():
            values.append(8 * buffer.size / _seconds(world, direction, buffer))
    return min((quartiles(values) for values in taken.values()), key=lambda found: found[1])


def _seconds(world: World, pair: tuple[int, int], buffer: Array) -> float:
    """Return how long `buffer` takes from the first of `pair` to the second. Collective."""
    sender, receiver = pair
    world.barrier()
    start = time.perf_counter()
    if world.rank == sender:
        world.comm.Send(buffer, receiver, TAG)
        world.comm.Recv(bytearray(1), receiver, TAG)  # it has arrived
    elif world.rank == receiver:
        world.comm.Recv(buffer, sender, TAG)
        world.comm.Send(b"!", sender, TAG)
    taken = time.perf_counter() - start
    world.wait([world.comm.Ibarrier()])  # naps: the cores are for those two
    return world.broadcast(taken, sender)
