"""How long each strategy takes, and what a node's wire carries meanwhile."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpidl import codecs
from mpidl.bucket import BUCKET_BYTES
from mpidl.codecs import PowerSGD
from mpidl.errors import InvalidArgument
from mpidl.exchange import PIECE_BYTES
from mpidl.overlap import GROUP_BYTES
from mpidl.plan import collectives, formulas
from mpidl.refuse import refuses
from mpidl.strategies import TAKE_CODECS, Ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.plan.topology import Constants, Topology

    Model = Callable[["Job", Topology, Constants], "Times"]

RING_CHUNK_BYTES: int = inspect.signature(Ring).parameters["chunk_bytes"].default
MESSAGE_SECONDS = 3e-6  # measured: what a message in `Exchange` costs the core, in Python and MPI
MATRIX_SIDE = 1024
FORWARD = 1 / 3  # of the time of forward and backward together


@dataclass(frozen=True)
class Job:
    """A gradient of `nbytes` bytes, `itemsize` bytes a number, and how it travels."""

    nbytes: float
    itemsize: int = 4
    codec: str | None = None
    side: int = MATRIX_SIDE  #: of the square matrices that the gradient consists of, for PowerSGD

    @refuses
    def encoded(self) -> float:
        """Return the bytes that travel for each byte of the gradient."""
        codec = codecs.make(self.codec)
        if codec is None:
            return 1.0
        if isinstance(codec, PowerSGD):  # rank (m + n) numbers of m n, where that is half or less
            ratio = 2 * codec.rank / self.side
            return ratio if ratio < 1 / 2 else 1.0
        piece = PIECE_BYTES // self.itemsize
        return codec.nbytes(piece) / piece / self.itemsize

    @refuses
    def codec_seconds(self, constants: Constants, encoded: float, decoded: float) -> float:
        """Return what it takes a core to encode, and to decode, so many bytes of gradient."""
        if self.codec is None:
            return 0.0
        if self.codec not in constants.codecs:
            known = ", ".join(constants.codecs)
            raise InvalidArgument(
                f"codec {self.codec!r}: its speed is not known; that of {known} is"
            )
        encode, decode = constants.codecs[self.codec]
        return (encode * encoded + decode * decoded) / self.itemsize


@dataclass(frozen=True)
class Times:
    """Seconds of both parts of an average, and the bytes on a node's wire."""

    reduce: float
    share: float
    wire: float  #: of each MPI call: in the busier direction, of the busiest node


def allreduce(job: Job, topology: Topology, constants: Constants) -> Times:
    """2 n / M to weight, then MPI_Allreduce."""
    seconds, wire = collectives.allreduce(job.nbytes, topology, constants)
    return Times(_passes(2, job, topology, constants) + seconds, 0.0, wire)


def parameter_server(job: Job, topology: Topology, constants: Constants) -> Times:
    """2 n / M to weight, MPI_Reduce to one server; then MPI_Bcast."""
    reduced, up = collectives.reduce(job.nbytes, topology, constants)
    shared, down = collectives.bcast(job.nbytes, topology, constants)
    weighted = _passes(2, job, topology, constants)
    return Times(weighted + reduced, shared, up + down)


def sharded(job: Job, topology: Topology, constants: Constants) -> Times:
    """2 n / M to weight and pack, MPI_Reduce_scatter; MPI_Allgatherv, and 2 n / M to unpack."""
    reduced, up = collectives.reduce_scatter(job.nbytes, topology, constants)
    shared, down = collectives.allgather(job.nbytes, topology, constants)
    packed = _passes(2, job, topology, constants)
    return Times(packed + reduced, packed + shared, up + down)


def ring(job: Job, topology: Topology, constants: Constants) -> Times:
    """The longer of 2 (P-1)/P n beta on the wire and on the node, where the ring crosses both.

    And 2 n / M to weight; with a codec, each rank encodes n and decodes (2 P - 1)/P n.
    """
    p, n, ratio = topology.ranks, job.nbytes, job.encoded()
    cost = formulas.ring(n * ratio, p, RING_CHUNK_BYTES * ratio)
    seconds = cost.seconds(constants.between_ranks(topology), constants.add_seconds)
    wire = 0.0
    if topology.nodes > 1:
        between = cost.seconds(constants.wire, constants.add_seconds)
        seconds, wire = (between if topology.local == 1 else max(seconds, between)), cost.wire
    coded = job.codec_seconds(constants, n, (2 * p - 1) / p * n)
    return Times(_passes(2, job, topology, constants) + seconds + coded, 0.0, wire)


def hierarchical(job: Job, topology: Topology, constants: Constants) -> Times:
    """The longer of 2 (N-1)/N n beta on the wire and a rank's own work, which goes on meanwhile.

    Its work, of n / L: the node's sum, which reads all L gradients, L n / M for all together; the
    mean of N nodes, written to memory; messages; and a codec, which encodes n / L, and decodes
    (2 (N-1) + 1) / N of it, or once more with feedback. PowerSGD makes P Q^T twice instead, and
    cannot go on while P, and then Q, is on its way: its work and the wire's add up.
    """
    n, nodes, local = job.nbytes, topology.nodes, topology.local
    share = n / local
    waiting = formulas.rounds(local) * constants.between_ranks(topology).latency
    work = _passes(1, job, topology, constants)
    if nodes == 1:
        return Times(work + waiting, waiting, 0.0)
    low_rank = isinstance(codecs.make(job.codec), PowerSGD)
    ratio = job.encoded()
    messages = formulas.in_blocks(share * ratio if low_rank else share, nodes, PIECE_BYTES)
    cost = formulas.two_hops(n * ratio, nodes, messages)
    wire = cost.seconds(constants.wire, constants.add_seconds)
    work += n / constants.memory_rate + (nodes - 1) / nodes * share * constants.add_seconds
    work += messages * MESSAGE_SECONDS
    decoded = 2.0 if low_rank else (2 * nodes - 1) / nodes + _feeds_back(job.codec)
    work += job.codec_seconds(constants, share, decoded * share)
    if low_rank:
        rounds_more = 2 * constants.wire.latency  # a second exchange
        return Times(wire + rounds_more + work + waiting, waiting, cost.wire)
    half = max(wire, work) / 2
    if job.codec is None:  # sums to their owners, and parameters back
        return Times(half + waiting, half + waiting, cost.wire)
    return Times(2 * half + waiting, waiting, cost.wire)


MODELS: dict[str, Model] = {
    "allreduce": allreduce,
    "hierarchical": hierarchical,
    "ring": ring,
    "parameter_server": parameter_server,
    "sharded": sharded,
}


@refuses
def times(strategy: str, job: Job, topology: Topology, constants: Constants) -> Times:
    """Return what averaging `job` takes, bucket by bucket, one after the other.

    Raises InvalidArgument for what `accepts` refuses.
    """
    if strategy not in MODELS:
        raise InvalidArgument(f"strategy {strategy!r}: expected one of {', '.join(MODELS)}")
    if not accepts(strategy, job.codec):
        raise InvalidArgument(
            f"codec {job.codec!r} with strategy {strategy!r}: hierarchical takes any, ring those "
            "without feedback, and the others none"
        )
    if topology.ranks == 1:
        return Times(0.0, 0.0, 0.0)
    buckets = max(1, math.ceil(job.nbytes / BUCKET_BYTES))
    one = MODELS[strategy](replace(job, nbytes=job.nbytes / buckets), topology, constants)
    return Times(buckets * one.reduce, buckets * one.share, buckets * one.wire)


def accepts(strategy: str, codec: str | None) -> bool:
    """Tell whether the strategy takes the codec. Raises InvalidArgument for an unknown codec."""
    if codecs.make(codec) is None:
        return True
    return strategy in TAKE_CODECS and not (strategy == "ring" and _feeds_back(codec))


def _feeds_back(codec: str | None) -> bool:
    """Tell whether what an encoding leaves out is added to the next step's gradient."""
    made = codecs.make(codec)
    return isinstance(made, PowerSGD) or (made is not None and made.feedback)


@refuses
def predict(
    strategy: str,
    codec: str | None,
    nbytes: float,
    topology: Topology,
    constants: Constants,
    itemsize: int = 4,
) -> float:
    """Return the seconds in which `strategy` averages a gradient of `nbytes` over all ranks.

    From `reduce` to the end of `share`, in a call for each bucket. Not collective. Raises
    InvalidArgument for a strategy that is not in MODELS, and for a codec that it does not take.
    """
    found = times(strategy, Job(nbytes, itemsize, codec), topology, constants)
    return found.reduce + found.share


@refuses
def step(compute: float, nbytes: float, found: Times) -> tuple[float, float]:
    """Return the seconds of a step without overlap, and with it.

    With: forward F, then backward B makes the k groups of a gradient one after the other, and each
    is averaged, R / k, when it is there and the one before is done; `share` S goes on in the next
    forward, whose first layers come first. max(F + S/k, F/k + S) + max(B + R/k, B/k + R). Messages
    take nothing from the cores that compute.
    """
    groups = max(1, math.ceil(nbytes / GROUP_BYTES[0]))
    forward, backward, reduce = FORWARD * compute, (1 - FORWARD) * compute, found.reduce
    first = max(forward + found.share / groups, forward / groups + found.share)
    longest = max(backward + reduce / groups, backward / groups + reduce)
    return compute + reduce + found.share, first + longest


def _passes(count: float, job: Job, topology: Topology, constants: Constants) -> float:
    """Return the seconds that all ranks of a node take to move `count` gradients each in memory."""
    return count * job.nbytes * topology.local / constants.memory_rate
