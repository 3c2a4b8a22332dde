"""What a prediction is made for: the ranks, and the constants of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpidl.errors import InvalidArgument
from mpidl.plan.formulas import Link
from mpidl.refuse import refuses

ALGORITHMS = ("textbook", "openmpi")  # of MPI's collectives
#: TCP's share of a full frame on Ethernet: 1448 of 1514 bytes; preamble and gap not counted.
PAYLOAD = 1448 / 1514
LOCAL_LATENCY = 1e-6
COPIES = 4  # bytes of memory moved for each sent on a node: copied in and copied out

#: Seconds to encode and to decode a number, measured on one core of a virtual x86 machine.
CODEC_SECONDS = {
    "bf16": (0.8e-9, 0.2e-9),
    "fp16": (1.2e-9, 0.9e-9),
    "int8": (1.6e-9, 0.4e-9),
    "powersgd": (1.0e-9, 0.5e-9),  # of a matrix: two thin products; P Q^T, made twice
    "signsgd": (0.8e-9, 0.2e-9),
    "topk": (1.1e-9, 0.2e-9),
}


@dataclass(frozen=True)
class Topology:
    """Ranks on nodes, block by block: the first `ranks_per_node` on the first one.

    Raises InvalidArgument for less than one, and for nodes that would not be equal.
    """

    ranks: int
    ranks_per_node: int = 1

    @refuses
    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1:
            raise InvalidArgument(f"{self}: expected 1 or more of both")
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise InvalidArgument(
                f"{self.ranks} ranks, {self.ranks_per_node} a node: expected a multiple, or fewer"
            )

    @property
    def local(self) -> int:
        """Return the number of ranks on a node."""
        return min(self.ranks, self.ranks_per_node)

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return self.ranks // self.local


@dataclass(frozen=True)
class Constants:
    """The machine: rates in bytes a second, times in seconds.

    Raises InvalidArgument for a rate that is not positive, and for an unknown set of algorithms.
    """

    wire: Link  #: between nodes; all ranks of a node share it
    memory_rate: float = 20e9  #: read and written by all ranks of a node together
    add_seconds: float = 0.1e-9  #: gamma: a byte, added by one core in its cache
    algorithms: str = "textbook"  #: of MPI's collectives, one of ALGORITHMS
    #: Between ranks of a node while all send; None: copies through the node's memory.
    local: Link | None = None
    #: Of each codec: seconds to encode, and to decode, a number.
    codecs: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(CODEC_SECONDS))

    @refuses
    def __post_init__(self) -> None:
        rates = self.wire.rate, self.memory_rate, self.local.rate if self.local else 1
        if not (min(rates) > 0 and min(self.wire.latency, self.add_seconds) >= 0):
            raise InvalidArgument(f"{self}: expected rates above 0, and times of 0 or more")
        if self.algorithms not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise InvalidArgument(f"algorithms {self.algorithms!r}: expected one of {known}")

    @refuses
    def between_ranks(self, topology: Topology) -> Link:
        """Return the link between ranks of a node."""
        if self.local is not None:
            return self.local
        return Link(LOCAL_LATENCY, self.memory_rate / (COPIES * topology.local))
