"""The constants of this machine, measured in ranks and fitted by least squares."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import codecs, mpi
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.exchange import PIECE_BYTES
from mpidl.plan.formulas import Link
from mpidl.plan.topology import CODEC_SECONDS, PAYLOAD, Constants
from mpidl.staging import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpidl.codecs import Codec
    from mpidl.world import World

TURNS = 5
SHORT = (8, 64, 512, 2048)  # bytes: alpha
LONG_SECONDS = (
    0.25  # of the longest message: beside it, the burst that a link lets through is short
)
FIRST_BYTES, LAST_BYTES = 1 << 20, 1 << 26
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the longest message: beta
BOTH_WAYS = (1 << 19, 1 << 20, 1 << 21)  # bytes: what stalls
BACK_TO_BACK = 4  # messages
MEMORY_BYTES = 32 << 20  # of an operand: no cache holds three
CACHED_BYTES = 1 << 16
LOOPS = 20
TAG = 11
LATENCY = 2e-6  # of a wire that is not measured


def measure(world: World, turns: int = TURNS) -> dict[str, Any]:
    """Return what `constants` takes. Collective; the same on every rank.

    Between nodes: the first ranks of the first two, while all others sleep. On a node: all ranks at
    once. Each number is a median over `turns`, on the slowest rank. Raises InvalidArgument on every
    rank where nodes have different numbers of ranks.
    """
    if len(set(map(len, world.members))) > 1:
        raise InvalidArgument("hosts: expected the same number of ranks on each")
    found: dict[str, Any] = {"ranks": world.size, "nodes": world.nodes}
    vendor = mpi.vendor(world.MPI.Get_library_version())
    found["algorithms"] = "openmpi" if vendor == "openmpi" else "textbook"
    found["add_seconds"] = _add(world, CACHED_BYTES, turns) / CACHED_BYTES
    moved = 3 * MEMORY_BYTES * world.local_size  # two operands read, one written
    found["memory_rate"] = moved / _add(world, MEMORY_BYTES, turns)
    found["codecs"] = CODEC_SECONDS | {
        name: _codec(world, codec, turns)
        for name, make in codecs.CODECS.items()
        if not isinstance(codec := make(), codecs.PowerSGD)
    }
    found["local"] = _local(world, turns) if world.local_size > 1 else None
    found["wire"] = _wire(world, turns) if world.nodes > 1 else None
    return found


def constants(
    found: dict[str, Any],
    ranks_per_node: int,
    rate: float | None = None,
    latency: float | None = None,
    memory_rate: float | None = None,
    algorithms: str | None = None,
) -> Constants:
    """Return the constants of a report; what is given takes the place of what was measured.

    `rate` is that of a node's wire, in bytes a second. Where more ranks are planned for a node than
    were measured, they share what those had. Raises InvalidArgument where no wire is known.
    """
    local, wire = (found[name] and Link(**found[name]) for name in ("local", "wire"))
    if wire is None and rate is None:
        raise InvalidArgument("rate: needed too: these ranks are all on one node")
    wire = wire or Link(LATENCY, 1.0)
    if rate is not None:
        wire = replace(wire, rate=rate * PAYLOAD)
    if latency is not None:
        wire = replace(wire, latency=latency)
    if local is not None:
        measured = found["ranks"] // found["nodes"]
        local = replace(local, rate=local.rate * min(1, measured / ranks_per_node))
    return Constants(
        wire,
        memory_rate or found["memory_rate"],
        found["add_seconds"],
        algorithms or found["algorithms"],
        local,
        {name: (encode, decode) for name, (encode, decode) in found["codecs"].items()},
    )


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return a and b of the line a + b x through the points, each as near as it is high.

    Least squares of (a + b x - y) / y: long times have large errors.
    """
    weights = 1 / np.asarray(y, np.float64)
    columns = np.stack([weights, np.asarray(x, np.float64) * weights], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(weights)), rcond=None)
    return float(a), float(b)


def rate_of(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return bytes a second from the slope of the line. Raises MpidlError where there is none."""
    _, beta = line(sizes, seconds)
    if beta <= 0:
        raise MpidlError("longer messages took no longer: this machine is too busy to measure")
    return 1 / beta


def stalls(sizes: Sequence[float], seconds: Sequence[float], rate: float) -> tuple[float, float]:
    """Return `stall` and `eager` of messages of `sizes` bytes that take so long both ways.

    What goes by beyond a message's own time is stall (m - eager) bytes. 0, 0 where it is little.
    """
    beyond = [t * rate - m for m, t in zip(sizes, seconds, strict=True)]
    slope, start = np.polyfit(np.asarray(sizes, np.float64), beyond, 1)
    if slope < 0.1:
        return 0.0, 0.0
    return float(min(1.0, slope)), float(max(0.0, -start / slope))


def _wire(world: World, turns: int) -> dict[str, float]:
    pair = world.members[0][0], world.members[1][0]
    found = _between(world, pair, turns) if world.rank in pair else {}
    world.wait([world.comm.Ibarrier()])
    return world.broadcast(found, pair[0])


def _between(world: World, pair: tuple[int, int], turns: int) -> dict[str, float]:
    """Measure the link, on both ranks of the pair."""
    comm, first = world.comm, world.rank == pair[0]
    other = pair[1] if first else pair[0]

    def one_way(nbytes: int, handed_over: list[float] | None = None) -> float:
        """Return the seconds of a message and of an empty answer, on the first rank."""
        buffer = np.ones(nbytes, np.uint8)
        start = time.perf_counter()
        if first:
            comm.Send(buffer, other, TAG)
            if handed_over is not None:
                handed_over.append(time.perf_counter() - start)
            comm.Recv(bytearray(0), other, TAG)
        else:
            comm.Recv(buffer, other, TAG)
            comm.Send(b"", other, TAG)
        return time.perf_counter() - start

    def agreed(value: float) -> float:
        """Return the first rank's value on both."""
        cell = np.array([value])
        if first:
            comm.Send(cell, other, TAG)
        else:
            comm.Recv(cell, other, TAG)
        return float(cell[0])

    size = FIRST_BYTES
    while agreed(one_way(size)) < LONG_SECONDS and size < LAST_BYTES:
        size *= 2
    sizes = [int(size * part) for part in PARTS]
    times = [_median(turns, partial(one_way, n)) for n in sizes]
    rate = rate_of(sizes, [agreed(t) for t in times])
    short = [_median(10 * turns, partial(one_way, n)) for n in SHORT]
    answered, _ = line(SHORT, [agreed(t) for t in short])
    handed: list[float] = []
    whole = agreed(_median(turns, partial(one_way, CHUNK_BYTES, handed)))
    held = max(0.0, (whole - agreed(float(np.median(handed or [0])))) * rate)

    def both_ways(nbytes: int) -> float:
        out, back = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        comm.Sendrecv(out, other, TAG, back, other, TAG)  # the first finds the wire empty
        start = time.perf_counter()
        for _ in range(BACK_TO_BACK):
            comm.Sendrecv(out, other, TAG, back, other, TAG)
        return (time.perf_counter() - start) / BACK_TO_BACK

    both = [agreed(_median(turns, partial(both_ways, n))) for n in BOTH_WAYS]
    stall, eager = stalls(BOTH_WAYS, both, rate)
    link = {"latency": max(0.0, answered / 2), "rate": rate}
    return link | {"stall": stall, "eager": eager, "held": min(held, CHUNK_BYTES)}


def _local(world: World, turns: int) -> dict[str, float]:
    """Measure messages to the next rank of the node, from all at once."""
    local = world.local
    right, left = (local.rank + 1) % local.size, (local.rank - 1) % local.size

    def around(nbytes: int) -> float:
        out, back = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        local.Sendrecv(out, right, TAG, back, left, TAG)
        start = time.perf_counter()
        for _ in range(LOOPS):
            local.Sendrecv(out, right, TAG, back, left, TAG)
        return (time.perf_counter() - start) / LOOPS

    def slowest(sizes: Sequence[int]) -> list[float]:
        return [_slowest(world, _median(turns, partial(around, n))) for n in sizes]

    latency, _ = line(SHORT, slowest(SHORT))
    return {"latency": max(0.0, latency), "rate": rate_of(BOTH_WAYS, slowest(BOTH_WAYS))}


def _add(world: World, nbytes: int, turns: int) -> float:
    """Return the seconds of numpy.add on operands of `nbytes`, on all ranks at once."""
    x, y = np.zeros(nbytes // 4, np.float32), np.zeros(nbytes // 4, np.float32)
    loops = max(1, MEMORY_BYTES // nbytes)

    def add() -> float:
        world.barrier()
        start = time.perf_counter()
        for _ in range(loops):
            np.add(x, y, out=x)
        return (time.perf_counter() - start) / loops

    add()
    return _slowest(world, _median(turns, add))


def _codec(world: World, codec: Codec, turns: int) -> tuple[float, float]:
    """Return the seconds a number to encode and to decode."""
    values = np.random.default_rng(world.rank).standard_normal(PIECE_BYTES // 4, np.float32)
    message, back = np.zeros(codec.nbytes(values.size), np.uint8), np.empty_like(values)

    def loop(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(LOOPS):
            work()
        return (time.perf_counter() - start) / LOOPS / values.size

    world.barrier()
    encode = _median(turns, lambda: loop(lambda: codec.encode(values, message)))
    decode = _median(turns, lambda: loop(lambda: codec.decode(message, back)))
    return _slowest(world, encode), _slowest(world, decode)


def _median(turns: int, seconds: Callable[[], float]) -> float:
    return float(np.median([seconds() for _ in range(turns)]))


def _slowest(world: World, seconds: float) -> float:
    found: float = world.comm.allreduce(seconds, world.MPI.MAX)
    return found
