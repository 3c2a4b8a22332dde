"""Run by `mpidl doctor --hosts`, a rank on each host: what the network between them carries."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.bench import jobs, timing, wire
from mpidl.trace.clocks import offset

if TYPE_CHECKING:
    from mpidl.world import World

SECONDS = 5.0  # for all pairs together
PINGS, CLOCK_PINGS = 20, 10
LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 23  # of a message
BURST_BYTES = 1 << 20
REPEATS = 3  # of the longest one
ALLREDUCE_SECONDS = 0.1  # that its bytes take on the slowest wire
LOOPS = 3
TAG = 11
NET, RDMA = Path("/proc/net/dev"), Path("/sys/class/infiniband")


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return who measures with whom, round by round: each pair once, all of a round at once.

    The tournament of the circle method: one stays in its place, the others go around.
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats[1:] = [seats[-1], *seats[1:-1]]
    return found if count > 1 else []


def measure(world: World, seconds: float = SECONDS) -> dict[str, Any]:
    """Return what `mpidl doctor` judges, the same on rank 0 alone. Collective.

    "pairs" are (a, b, seconds of latency, bits a second of the slower direction); "clocks" how far
    those of the ranks are ahead of rank 0's, with the uncertainty, both in seconds.
    """
    before, moved = traffic(), 0
    clocks = _clocks(world)
    every, mine, left = rounds(world.size), [], 0
    begin = time.perf_counter()
    for number, met in enumerate(every):
        if _together(world, time.perf_counter() - begin) > seconds:
            left = sum(map(len, every[number:]))
            break
        budget = (seconds - (time.perf_counter() - begin)) / (len(every) - number)
        for a, b in met:
            if world.rank == a:
                latency, rate, count = _ask(world, b, max(budget, 0.0))
                mine.append((a, b, latency, rate))
                moved += count
            elif world.rank == b:
                moved += _answer(world, a)
    pairs = sorted(pair for found in _gather(world, mine) for pair in found)
    report: dict[str, Any] = {"pairs": pairs, "left": left, "clocks": clocks}
    report["allreduce"] = _allreduce(world, min((pair[3] for pair in pairs), default=1e9))
    after = traffic()
    used = {name: count - before.get(name, 0) for name, count in after.items()}
    report["names"] = _gather(world, world.MPI.Get_processor_name())
    report["traffic"] = _gather(world, {name: count for name, count in used.items() if count > 0})
    report["moved"] = _gather(world, moved)
    return report


def traffic() -> dict[str, int]:
    """Return the bytes that went through each network interface here, both ways."""
    found = {}
    with suppress(OSError):
        for line in NET.read_text().splitlines()[2:]:
            name, _, numbers = line.partition(":")
            words = numbers.split()
            found[name.strip()] = int(words[0]) + int(words[8])
    for device in RDMA.glob("*"):
        for file in device.glob("ports/*/counters/port_*_data"):  # in units of four bytes
            with suppress(OSError, ValueError):
                found[device.name] = found.get(device.name, 0) + 4 * int(file.read_text())
    return found


def _clocks(world: World) -> list[tuple[float, float]]:
    """Return what `offset` says of each rank, by rank 0's clock; on rank 0. Collective."""
    found = [(0.0, 0.0)]
    told = np.zeros(1)
    if world.rank:
        for _ in range(CLOCK_PINGS):
            world.wait([world.comm.Irecv(told, 0, TAG)])
            told[0] = time.time()
            world.comm.Send(told, 0, TAG)
        return []
    for rank in range(1, world.size):
        samples = []
        for _ in range(CLOCK_PINGS):
            asked = time.time()
            world.comm.Send(told, rank, TAG)
            world.comm.Recv(told, rank, TAG)
            samples.append((asked, float(told[0]), time.time()))
        found.append(offset(samples))
    return found


def _together(world: World, seconds: float) -> float:
    """Return the most of all ranks' seconds. Collective. Naps: others may be at work."""
    own, most = np.array([seconds]), np.zeros(1)
    world.wait([world.comm.Iallreduce(own, most, world.MPI.MAX)])
    return float(most[0])


def _gather(world: World, value: Any) -> list[Any]:
    """Return every rank's object, on every rank. Collective. Waits with naps first."""
    world.wait([world.comm.Ibarrier()])
    return world.gather(value)


def _ask(world: World, peer: int, budget: float) -> tuple[float, float, int]:
    """Return latency in seconds, bits a second, and the bytes moved, between here and `peer`.

    An order of (kind, size) goes first: 1 to answer it, 2 to take a message of that size and send
    one back, 0 to end. Messages grow until they take a part of the `budget`, in seconds; but they
    should be longer than a burst that a switch lets through.
    """
    comm, order, moved = world.comm, np.zeros(2, np.int64), 0
    answer = np.zeros(1, np.int64)
    trips: list[float] = []
    begin = time.perf_counter()
    for i in range(PINGS + 2):
        start = time.perf_counter()
        order[:] = 1, 0
        comm.Send(order, peer, TAG)
        comm.Recv(answer, peer, TAG)
        if i > 1 or start - begin > budget / 4:  # the first open connections
            trips.append(time.perf_counter() - start)
        if trips and time.perf_counter() - begin > budget / 4:
            break
    trip = median(trips)
    size = LEAST_BYTES
    while True:
        buffer = np.ones(size, np.uint8)
        taken: list[float] = []
        last = size == MOST_BYTES
        while not taken or (last and len(taken) < REPEATS):
            order[:] = 2, size
            start = time.perf_counter()
            comm.Send(order, peer, TAG)
            comm.Send(buffer, peer, TAG)
            comm.Recv(answer, peer, TAG)
            middle = time.perf_counter()
            comm.Send(answer, peer, TAG)
            comm.Recv(buffer, peer, TAG)
            end = time.perf_counter()
            taken.append(max(middle - start, end - middle))
            moved += 2 * size
            left = budget - (end - begin)
            last = last or 4 * taken[0] > (left / 4 if size >= BURST_BYTES else left)
            if 2 * taken[0] > left:
                break
        if last:
            break
        size *= 2
    seconds = median(taken)
    rate = 8 * size / max(seconds - trip, seconds / 4)
    order[:] = 0, 0
    comm.Send(order, peer, TAG)
    return trip / 2, rate, moved


def _answer(world: World, peer: int) -> int:
    """Do what `peer` asks for, until it has no more; return the bytes moved."""
    comm, order, moved = world.comm, np.zeros(2, np.int64), 0
    answer = np.zeros(1, np.int64)
    world.wait([comm.Irecv(order, peer, TAG)])
    while order[0]:
        if order[0] == 2:
            buffer = np.ones(int(order[1]), np.uint8)
            comm.Recv(buffer, peer, TAG)
            comm.Send(answer, peer, TAG)
            comm.Recv(answer, peer, TAG)
            comm.Send(buffer, peer, TAG)
            moved += 2 * buffer.size
        else:
            comm.Send(answer, peer, TAG)
        comm.Recv(order, peer, TAG)
    return moved


def _allreduce(world: World, rate: float) -> dict[str, float]:
    """Return bytes and seconds of an MPI_Allreduce, and of the wire of `rate`. Collective."""
    per_byte = wire.seconds(1, world.size, rate) or 1e-9
    size = int(min(max(ALLREDUCE_SECONDS / per_byte, LEAST_BYTES), MOST_BYTES)) // 4
    size = int(world.broadcast(size))
    values = np.ones(size, np.float32)

    def call() -> None:
        world.comm.Allreduce(world.MPI.IN_PLACE, values)
        values[:] = 1

    timing.of_one(world, call)
    seconds = timing.of_one(world, call, LOOPS)
    return {
        "bytes": 4 * size,
        "seconds": seconds,
        "wire_seconds": wire.seconds(4 * size, world.size, rate),
    }


if __name__ == "__main__":
    jobs.in_ranks(measure)
