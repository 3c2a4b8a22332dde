"""What each algorithm sends and adds, as counts on its longest path: one equation a function.

The model is Hockney's (1994, "The communication challenge for MPP", section 2): a message of m
bytes takes alpha + m beta. A byte that is added takes gamma. So with n bytes and p processes a
collective takes a alpha + b beta + g gamma. Where no other source stands, the equations are those
of Thakur, Rabenseifner and Gropp (2005, "Optimization of collective communication operations in
MPICH").

Two terms more, of networks whose two directions share a connection and a buffer, as TCP's do; both
are 0 unless measured. With `Link.stall` s: while a message of m bytes comes from the very process
that another goes to, the answer that lets the next one start waits behind the data; meanwhile one
direction idles, for s (m - eager) bytes. With `Link.held` h: a blocking send returns h bytes before
its end, so that a process that receives, then sends, m bytes a turn needs 2 m - h for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpidl.refuse import refuses


@dataclass(frozen=True)
class Link:
    """What joins two processes. One direction; the other is as quick, at the same time."""

    latency: float  #: alpha, seconds a message
    rate: float  #: 1 / beta, bytes a second
    stall: float = 0.0  #: share of a message, 0 to 1
    eager: float = 0.0  #: bytes of a message that never stall
    held: float = 0.0  #: bytes that the network takes over from a sender


@dataclass(frozen=True)
class Cost:
    """Counts on the longest path, and what the busiest process sends or receives."""

    messages: float
    nbytes: float
    added: float = 0.0  #: bytes
    exchanged: tuple[tuple[float, float], ...] = ()  #: (messages, bytes of each) with one partner
    wire: float = 0.0  #: bytes, in the busier direction

    @refuses
    def seconds(self, link: Link, gamma: float) -> float:
        """Return messages alpha + bytes beta + added gamma, and what stalls.

        The first exchange does not: it finds the link empty.
        """
        stalled = sum(k * max(0.0, m - link.eager) for k, m in self.exchanged)
        if self.exchanged:
            count, first = self.exchanged[0]
            stalled -= min(1.0, count) * max(0.0, first - link.eager)
        nbytes = self.nbytes + link.stall * stalled
        return self.messages * link.latency + nbytes / link.rate + self.added * gamma

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.messages + other.messages,
            self.nbytes + other.nbytes,
            self.added + other.added,
            self.exchanged + other.exchanged,
            self.wire + other.wire,
        )

    def times(self, count: float) -> Cost:
        """Return the cost of `count` such calls, one after the other."""
        return Cost(
            self.messages * count,
            self.nbytes * count,
            self.added * count,
            tuple((k * count, m) for k, m in self.exchanged),
            self.wire * count,
        )


def rounds(p: int) -> int:
    """ceil(log2 p): how often a group of p halves."""
    return (p - 1).bit_length()


def recursive_doubling(n: float, p: int) -> Cost:
    """log2 p (alpha + n beta + n gamma): an allreduce of small arrays (section 4.5).

    Two rounds more where p is no power of two: ranks that are too many give theirs away first.
    """
    q = 1 << (p.bit_length() - 1)
    k = rounds(q) + 2 * (p > q)
    return Cost(k, k * n, k * n, ((k, n),), k * n)


def rabenseifner(n: float, p: int) -> Cost:
    """2 log2 p alpha + 2 (p-1)/p n beta + (p-1)/p n gamma: an allreduce (section 4.5).

    Halves, quarters, ... are exchanged and added; then the sums, the other way round. Where p is
    no power of two, the r that are too many halve their sum with a neighbour first, and get the
    result at last: 2 n beta more, in 4 messages, of which one is an exchange.
    """
    q = 1 << (p.bit_length() - 1)
    halves = tuple((2.0, n / 2**k) for k in range(1, q.bit_length()))
    moved, added = 2 * (q - 1) / q * n, (q - 1) / q * n
    core = Cost(2 * rounds(q), moved, added, halves, moved)
    return core if p == q else core + Cost(3, 2 * n, n / 2, ((1, n / 2),), 1.5 * n)


def reduce_scatter_gather(n: float, p: int) -> Cost:
    """2 log2 p alpha + 2 (p-1)/p n beta + (p-1)/p n gamma: a reduce, of much (section 4.4)."""
    moved = 2 * (p - 1) / p * n
    return Cost(2 * rounds(p), moved, (p - 1) / p * n, (), moved)


def scatter_allgather(n: float, p: int) -> Cost:
    """(log2 p + p - 1) alpha + 2 (p-1)/p n beta: a broadcast of much (section 4.2)."""
    moved = 2 * (p - 1) / p * n
    return Cost(rounds(p) + p - 1, moved, 0, (), moved)


def binomial(n: float, p: int, *, add: bool) -> Cost:
    """ceil(log2 p) (alpha + n beta [+ n gamma]): a broadcast, or reduce (sections 4.2 and 4.4)."""
    k = rounds(p)
    return Cost(k, k * n, k * n if add else 0, (), k * n)


def knomial(n: float, p: int) -> Cost:
    """3 ceil(log4 p) (alpha + n beta): a broadcast by a tree of radix 4, child after child."""
    k = 3 * -(-rounds(p) // 2)
    return Cost(k, k * n, 0, (), k * n)


def linear(n: float, p: int, *, add: bool) -> Cost:
    """(p-1) (alpha + n beta [+ n gamma]): from the root to each, or from each to the root."""
    k = p - 1
    return Cost(k, k * n, k * n if add else 0, (), k * n)


def chain(n: float, p: int, calls: int, held: float, *, add: bool) -> Cost:
    """((p-1) m + (calls-1) (2 m - h)) beta, with m = n / calls: from neighbour to neighbour.

    The first call passes p-1 links whole. Those in the middle receive, then send: from then on,
    2 m a call, less the h bytes that the network still holds when the next call begins.
    """
    m = n / calls
    moved = (p - 1) * m + (calls - 1) * (m if p == 2 else 2 * m - min(held, m))
    return Cost(p - 2 + calls, moved, n if add else 0, (), n)


def on_node(n: float, p: int, *, add: bool) -> Cost:
    """ceil(log2 p) alpha + (p-1)/p n beta [+ n gamma]: a reduce, or a broadcast, by any tree.

    p-1 copies are made, in memory whose speed the p ranks share: 1 / beta is what one of them gets.
    """
    return Cost(rounds(p), (p - 1) / p * n, n if add else 0)


def ring_pass(n: float, p: int, *, add: bool) -> Cost:
    """(p-1) alpha + (p-1)/p n beta [+ (p-1)/p n gamma]: a reduce-scatter, or an allgather."""
    moved = (p - 1) / p * n
    exchanged = ((1.0, n / 2),) if p == 2 else ()
    return Cost(p - 1, moved, moved if add else 0, exchanged, moved)


def pairwise(n: float, p: int, local: int) -> Cost:
    """(p-1) alpha + (p-1)/p n beta + (p-1)/p n gamma: a reduce-scatter of much (section 4.3).

    Every rank sends to every other one: of `local` ranks on a node, local (p - local)/p n in all
    leaves it.
    """
    moved = (p - 1) / p * n
    between = local * (p - local) / p * n
    return Cost(p - 1, between if between else moved, moved, (), between)


def neighbor_exchange(n: float, p: int) -> Cost:
    """p/2 alpha + (p-1)/p n beta: an allgather of even p (Chen et al. 2005, section 3).

    One part is exchanged with a neighbour, then two at a time with either in turn.
    """
    exchanged = ((1.0, n / p), (p / 2 - 1, 2 * n / p))
    return Cost(p / 2, (p - 1) / p * n, 0, exchanged, (p - 1) / p * n)


def ring(n: float, p: int, chunk: float) -> Cost:
    """2 (p-1) alpha + 2 (p-1)/p n beta + (p-1)/p n gamma (Patarasuk and Yuan 2009, section 3).

    In messages of `chunk` bytes or less, which follow each other without a gap. Two processes have
    each other as both neighbours.
    """
    moved = 2 * (p - 1) / p * n
    m = min(chunk, n / p)
    exchanged = ((moved / m, m),) if p == 2 and m else ()
    return Cost(2 * (p - 1), moved, moved / 2, exchanged, moved)


def two_hops(n: float, p: int, messages: float) -> Cost:
    """2 alpha + 2 (p-1)/p n beta: each sends its piece to all, and the piece's mean to all.

    As `Exchange` does. Sums are counted where they are made: they take no time of the wire.
    """
    moved = 2 * (p - 1) / p * n
    return Cost(2 if messages else 0, moved, 0, (), moved)


def in_blocks(n: float, p: int, piece: float) -> float:
    """2 (p-1) ceil(n / (p piece)): the messages that one rank sends for n bytes in `Exchange`."""
    return 2 * (p - 1) * math.ceil(n / (p * piece)) if n else 0
