"""Which algorithms MPI takes, and how long its collectives take: on nodes, and between them.

"textbook" is MPICH's choice (Thakur et al. 2005): the quicker of two algorithms, between one leader
a node, after the ranks of the node have reduced to it. "openmpi" is what Open MPI 5 does where
nobody has tuned it. With several ranks a node its component "han" pipelines node and wire, in
segments of 64 KiB; its non-blocking reduce and broadcast work between the leaders. Without, "tuned"
has tables. Of those stand here what holds for the calls that the strategies make.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from mpidl.plan import formulas
from mpidl.staging import CHUNK_BYTES
from mpidl.strategies.sharded import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.plan.formulas import Cost
    from mpidl.plan.topology import Constants, Topology

Estimate: TypeAlias = tuple[float, float]  # seconds, and bytes on a node's wire
SEGMENT_BYTES = 1 << 16  # of "han"
PAIRWISE_BYTES = 1 << 19  # of the whole array, from which on MPICH exchanges pairwise
SMALL_BYTES = 8192  # below, "tuned" doubles recursively


def allreduce(n: float, topology: Topology, constants: Constants) -> Estimate:
    """Return what MPI_Allreduce of n bytes takes, in calls of CHUNK_BYTES."""
    nodes, calls = topology.nodes, _calls(n)
    m = n / calls
    options = [formulas.recursive_doubling(m, nodes), formulas.rabenseifner(m, nodes)]
    if constants.algorithms == "openmpi":
        if topology.local > 1 and nodes > 1:
            # both at once: the root sends in one, and receives in the other
            reduce, bcast = _han_reduce(n, nodes), _han_bcast(n, nodes)
            sent = bcast.wire + (reduce.wire / 2 if nodes > 2 else 0)
            both = formulas.Cost(
                reduce.messages + bcast.messages, max(sent, reduce.wire), n, (), sent
            )
            return _pipelined(both, n, 2, topology, constants)
        options = [options[m >= SMALL_BYTES]]
    return _on_leaders([o.times(calls) for o in options], n, 2, topology, constants)


def reduce(n: float, topology: Topology, constants: Constants) -> Estimate:
    """Return what MPI_Reduce of n bytes takes, in calls of CHUNK_BYTES."""
    nodes, calls = topology.nodes, _calls(n)
    m, held = n / calls, constants.wire.held
    options = [
        formulas.binomial(m, nodes, add=True).times(calls),
        formulas.reduce_scatter_gather(m, nodes).times(calls),
    ]
    if constants.algorithms == "openmpi":
        if topology.local > 1 and nodes > 1:
            return _pipelined(_han_reduce(n, nodes), n, 1, topology, constants)
        if nodes < 4:
            options = [formulas.chain(n, max(2, nodes), calls, held, add=True)]
        elif nodes < 8:
            options = [formulas.linear(n, nodes, add=True)]
        else:
            options = options[:1]
    return _on_leaders(options, n, 1, topology, constants)


def bcast(n: float, topology: Topology, constants: Constants) -> Estimate:
    """Return what MPI_Bcast of n bytes takes, in calls of CHUNK_BYTES."""
    nodes, calls = topology.nodes, _calls(n)
    m, held = n / calls, constants.wire.held
    options = [
        formulas.binomial(m, nodes, add=False).times(calls),
        formulas.scatter_allgather(m, nodes).times(calls),
    ]
    if constants.algorithms == "openmpi":
        if topology.local > 1 and nodes > 1:
            return _pipelined(_han_bcast(n, nodes), n, 1, topology, constants)
        if nodes < 4 or 8 <= nodes < 16:  # to both children of a binary tree, or to all
            options = [formulas.linear(n, nodes, add=False)]
        elif nodes < 8:
            options = [formulas.chain(n, nodes, calls, held, add=False)]
        elif 32 <= nodes < 1024:
            options = [formulas.knomial(m, nodes).times(calls)]
        else:
            options = options[1:]
    return _on_leaders(options, n, 1, topology, constants)


def reduce_scatter(n: float, topology: Topology, constants: Constants) -> Estimate:
    """Return what MPI_Reduce_scatter of n bytes takes, PIECE_BYTES of each part a call.

    The textbook exchanges long arrays pairwise; else it is a ring.
    """
    p, calls = topology.ranks, max(1, math.ceil(n / topology.ranks / PIECE_BYTES))
    if constants.algorithms == "textbook" and n / calls >= PAIRWISE_BYTES and topology.nodes > 1:
        one = formulas.pairwise(n / calls, p, topology.local).times(calls)
        return one.seconds(constants.wire, constants.add_seconds), one.wire
    return _around(n, topology, constants, lambda m, p: formulas.ring_pass(m, p, add=True))


def allgather(n: float, topology: Topology, constants: Constants) -> Estimate:
    """Return what MPI_Allgatherv of n bytes takes, PIECE_BYTES of each part a call."""
    p = topology.ranks
    if constants.algorithms == "openmpi" and p in (2, 4, 6):
        return _around(n, topology, constants, formulas.neighbor_exchange)
    return _around(n, topology, constants, lambda m, p: formulas.ring_pass(m, p, add=False))


def _around(
    n: float, topology: Topology, constants: Constants, cost: Callable[[float, int], Cost]
) -> Estimate:
    """Return what calls take that pass parts from neighbour to neighbour, ranks in node order.

    A ring crosses a node's wire once in each direction. Neighbours that exchange parts do so in
    every other step, at both ends of a node at once, with two parts in each direction.
    """
    p = topology.ranks
    calls = max(1, math.ceil(n / p / PIECE_BYTES))
    one = cost(n / calls, p)
    gamma = constants.add_seconds
    local = one.times(calls).seconds(constants.between_ranks(topology), gamma)
    if topology.nodes == 1:
        return local, 0.0
    if topology.local > 1 and one.exchanged:
        m = n / calls
        one = formulas.Cost(one.messages, m, 0, ((p / 2, 2 * m / p),), m)
    every = one.times(calls)
    wire = every.seconds(constants.wire, gamma)
    return (wire if topology.local == 1 else max(wire, local)), every.wire


def _on_leaders(
    options: list[Cost], n: float, ways: int, topology: Topology, constants: Constants
) -> Estimate:
    """Return the quickest of `options` between leaders; before or after it, each node's own tree.

    `ways`: 2 where the ranks of a node reduce to the leader and get the result from it, else 1.
    """
    gamma = constants.add_seconds
    seconds, wire = 0.0, 0.0
    if topology.nodes > 1:
        seconds, wire = min((o.seconds(constants.wire, gamma), o.wire) for o in options)
    if topology.local == 1:
        return seconds, wire
    return seconds + _on_node(n, ways, topology, constants), wire


def _pipelined(
    between: Cost, n: float, ways: int, topology: Topology, constants: Constants
) -> Estimate:
    """Return the time of the slower of the two: node, and wire."""
    wire = between.seconds(constants.wire, constants.add_seconds)
    return max(wire, _on_node(n, ways, topology, constants)), between.wire


def _on_node(n: float, ways: int, topology: Topology, constants: Constants) -> float:
    """Return the seconds that the ranks of a node take to reduce n bytes, or to spread them."""
    link, gamma = constants.between_ranks(topology), constants.add_seconds
    if topology.nodes == 1 and ways == 2:
        algorithms = formulas.recursive_doubling, formulas.rabenseifner
        return min(cost(n, topology.local).seconds(link, gamma) for cost in algorithms)
    seconds = formulas.on_node(n, topology.local, add=True).seconds(link, gamma)
    if ways == 2:
        seconds += formulas.on_node(n, topology.local, add=False).seconds(link, gamma)
    return seconds


def _han_reduce(n: float, nodes: int) -> Cost:
    """Return the cost of segments that are halved and gathered; with two leaders, just sent."""
    segments = max(1, math.ceil(n / SEGMENT_BYTES))
    if nodes == 2:
        return formulas.Cost(1, n, n, (), n)
    return formulas.reduce_scatter_gather(n / segments, nodes).times(segments)


def _han_bcast(n: float, nodes: int) -> Cost:
    """Return the cost of segments that the root sends to each of up to 3, else along a chain."""
    fanout = nodes - 1 if nodes <= 4 else 1
    return formulas.Cost(nodes - 1, fanout * n, 0, (), fanout * n)


def _calls(n: float) -> int:
    return max(1, math.ceil(n / CHUNK_BYTES))
