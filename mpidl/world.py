"""The ranks of one job, and what they do together."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpidl import abort, binding, clock, config, mpi, spawned, supervised, watchdog
from mpidl.errors import InvalidArgument, MpidlError, RankMismatch
from mpidl.making import known, made, noted
from mpidl.marks import Mark, shared, some
from mpidl.refuse import WRONG, told, wrong
from mpidl.trace import session as trace
from mpidl.unsent import sent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

T = TypeVar("T")

SPIN_SECONDS = 1e-4
NAP_SECONDS = 1e-4

_world: World | None = None


@dataclass(frozen=True)
class World:
    """All ranks of the job. Made by `mpidl.init`; `comm` is a private clone (MPI-4.1, 7.4.2)."""

    MPI: Any  #: the module mpi4py.MPI
    comm: Any  #: mpi4py.MPI.Intracomm
    rank: int  #: number of this rank, from 0 on
    size: int  #: number of ranks
    local_rank: int  #: rank among those that share this node's memory
    local_size: int  #: number of ranks on this node
    node: int  #: number of this node; nodes are numbered by their lowest rank
    nodes: int  #: number of nodes
    members: tuple[tuple[int, ...], ...]  #: the ranks of each node, by local rank
    local: Any  #: mpi4py.MPI.Intracomm of this node's ranks, by local rank
    beside: bool = False  #: whether this is for a thread beside another one that computes
    mark: Mark = field(default_factory=Mark, compare=False, repr=False)  #: what it is waiting in

    @classmethod
    def of(cls, MPI: Any, comm: Any, *, node: int | None = None) -> World:
        """Clone `comm` and find out who shares a node with whom. Collective.

        With `node`, the same number on all ranks of a node, that is known already.
        """
        comm = noted(made(MPI, comm, lambda: comm.Clone()))
        local = noted(made(MPI, comm, lambda: spawned.on_node(MPI, comm, node)))
        leaders = comm.allgather(local.bcast(comm.rank))
        members: dict[int, list[int]] = {}
        for rank, leader in enumerate(leaders):
            members.setdefault(leader, []).append(rank)
        order = sorted(members)
        return cls(
            MPI=MPI,
            comm=comm,
            rank=comm.rank,
            size=comm.size,
            local_rank=local.rank,
            local_size=local.size,
            node=order.index(leaders[comm.rank]),
            nodes=len(order),
            members=tuple(tuple(members[leader]) for leader in order),
            local=local,
            mark=Mark(comm),
        )

    def for_thread(self) -> World:
        """Return the same ranks with communicators of their own, for another thread. Collective."""
        world = replace(World.of(self.MPI, self.comm), beside=True)
        world.mark.checks = self.mark.checks
        return world

    def on_node(self) -> World:
        """Return the ranks of this node alone. Not collective."""
        return replace(
            self,
            comm=self.local,
            rank=self.local_rank,
            size=self.local_size,
            node=0,
            nodes=1,
            members=(tuple(range(self.local_size)),),
            mark=Mark(self.local, checks=self.mark.checks),
        )

    def alone(self) -> World:
        """Return this rank alone. Not collective."""
        return self.apart().on_node()

    def apart(self) -> World:
        """Return the same ranks, each as a node of its own. Not collective."""
        return replace(
            self,
            local_rank=0,
            local_size=1,
            node=self.rank,
            nodes=self.size,
            members=tuple((rank,) for rank in range(self.size)),
            local=self.MPI.COMM_SELF,
        )

    @property
    def threads(self) -> bool:
        """Whether several threads may call MPI at once (MPI_THREAD_MULTIPLE)."""
        multiple: bool = self.MPI.Query_thread() == self.MPI.THREAD_MULTIPLE
        return multiple

    @clock.counted(clock.WAIT)
    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        with self.mark.enter("barrier"):
            self.comm.Barrier()

    def wait(self, requests: list[Any]) -> None:
        """Complete `requests`, in place; the core is free for others where it may take long.

        MPI's own waiting keeps a core busy, which may be another rank's, or that of this process's
        own computation. So between nodes, and in a thread, this polls, and sleeps where nothing
        has come for SPIN_SECONDS: messages of a fast network are not kept waiting.
        """
        if self.nodes == 1 and not self.beside:
            self.MPI.Request.Waitall(requests)
            return
        done = self.MPI.Request.Testall
        start = time.perf_counter()
        while not done(requests):
            if time.perf_counter() - start > SPIN_SECONDS:
                time.sleep(NAP_SECONDS)
            else:  # time.sleep(0) may take 70 us
                os.sched_yield()

    @clock.counted(clock.WAIT)
    def gather_on_node(self, values: npt.NDArray[np.float64]) -> None:
        """Fill in `values` (local_size,), whose own element each rank has set. Collective.

        Returns when all ranks of this node have called it. With other nodes to wait for, waiting
        may take long, and leaves the core to others.
        """
        if self.nodes == 1 and not self.beside:
            self.local.Allgather(self.MPI.IN_PLACE, values)
        else:
            self.wait([self.local.Iallgather(self.MPI.IN_PLACE, values)])

    @clock.counted(clock.WAIT)
    def barrier_on_node(self) -> None:
        """Wait for all ranks of this node. Collective. Leaves the core to others, as above."""
        if self.nodes == 1 and not self.beside:
            self.local.Barrier()
        elif self.local_size > 1:
            self.wait([self.local.Ibarrier()])

    def agree(self, problem: MpidlError | str | None) -> None:
        """Raise on every rank if any rank passes a problem. Collective.

        The class is that of the lowest such rank; a text is a RankMismatch. The message names
        the ranks: "ranks 1, 3: ...", or "every rank: ..." where all say the same.
        """
        kind = type(problem) if isinstance(problem, MpidlError) else RankMismatch
        with self.mark.enter("agree"):
            problems = self.comm.allgather(None if problem is None else (kind, str(problem)))
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(problems):
            if found is not None:
                ranks.setdefault(found[1], []).append(rank)
        if not ranks:
            return
        kind = next(found[0] for found in problems if found is not None)
        message = "; ".join(f"{self._names(who)}: {text}" for text, who in ranks.items())
        try:
            failure: MpidlError = kind(message)
        except TypeError:  # a user's class, which takes other arguments
            failure = RankMismatch(message)
        raise shared(failure) from (problem if isinstance(problem, MpidlError) else None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let every rank raise what any rank raises (an MpidlError) in this context. Collective.

        What Python and NumPy raise for wrong arguments becomes InvalidArgument. Nothing in the
        context may wait for another rank.
        """
        try:
            yield
        except (MpidlError, *WRONG) as error:
            self.agree(error if isinstance(error, MpidlError) else wrong(error))
        else:
            self.agree(None)

    def same(self, value: str, what: str) -> None:
        """Raise RankMismatch on every rank where `value` is not the same on all. Collective.

        But for addresses in it, which tell one process's objects from another's.
        """
        value = _without_addresses(value)
        first = self.broadcast(value)
        self.agree(None if value == first else f"{what}: {value}, but rank 0 has {first}")

    def same_lines(self, lines: Sequence[str]) -> None:
        """Raise RankMismatch on every rank, with the first of `lines` unlike rank 0's. Collective.

        But for addresses in them, as in `same`.
        """
        mine = [_without_addresses(line) for line in lines]
        pairs = zip_longest(mine, self.broadcast(mine), fillvalue="no more")
        self.agree(next((f"{a}, where rank 0 has {b}" for a, b in pairs if a != b), None))

    def _names(self, ranks: list[int]) -> str:
        if len(ranks) == self.size:
            return "every rank" if self.size > 1 else "rank 0"
        return some(ranks)

    def broadcast(self, value: T, root: int = 0) -> T:
        """Return rank `root`'s object on every rank (pickled on the way). Collective.

        Raises InvalidArgument on every rank where it cannot be pickled, as `gather` does.
        """
        with self.mark.enter("broadcast from rank {}", (root,)):
            mine = value if self.comm.rank == root else None  # a replacement is alone
            return sent(self.MPI, self.rank, lambda it: [self.comm.bcast(it, root)], mine)[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's object, by rank, on every rank (pickled on the way). Collective."""
        with self.mark.enter("gather"):
            return sent(self.MPI, self.rank, self.comm.allgather, value)

    @clock.counted(clock.WAIT)
    def sum(self, values: Sequence[float] | npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the sum over ranks of `values` (k,), as float64, on every rank. Collective."""
        total = np.array(values, np.float64)
        self.mark.enter("sum of {} numbers", (total.size,))
        try:
            self.comm.Allreduce(self.MPI.IN_PLACE, total)
        finally:
            self.mark.leave()
        return total


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def revoke(world: World) -> None:
    """End all calls in which ranks wait for others, here and there, by an error. Not collective.

    Of all worlds, for a rank that waits in one of them does not come to the others. For MPIs that
    go on when a rank dies (ULFM, MPI_Comm_revoke).
    """
    for comm in known():
        if comm != world.MPI.COMM_NULL and not comm.Is_revoked():
            comm.Revoke()


def replace_current(world: World) -> None:
    """Let `current` return another world, and errors end it, after ranks of the first have died."""
    global _world
    if _world is not None:
        _world = world
        abort.replace(world.comm)
        trace.moved(world)


def current() -> World:
    """Return the world; `init()` where there is none yet, with its collective first call."""
    return _world or init()


def init(
    *, abort_on_error: bool = True, stall: str | None = None, check: str | None = None
) -> World:
    """Start MPI, if it is not running, and return the world. Collective at the first call.

    Works without a launcher too: then the world has one rank.

    Args:
        abort_on_error: a rank that ends by an exception or by `sys.exit(n)` with n != 0 ends the
            whole job. (Where scripts `raise SystemExit(n)` themselves, start them with `mpidl run`
            or `python -m mpi4py`, or it takes as long as `stall`.)
        stall: what becomes of a job in which ranks wait for others for MPIDL_STALL_SECONDS (60),
            besides a report of who waits for whom: "abort" ends it, if nothing changes, with status
            76; "warn" lets it go on. By default MPIDL_STALL, or else "abort". At the first call.
        check: "collectives" compares what the ranks call, before each collective, and raises
            RankMismatch on every rank where it differs. Costs time. By default MPIDL_CHECK.

    Raises InvalidArgument for other values, MPINotFound, and LauncherMismatch where ranks started
    by one MPI load another.
    """
    global _world
    if not isinstance(abort_on_error, bool):
        raise InvalidArgument(f"abort_on_error={told(abort_on_error)}: expected True or False")
    stall, checks, seconds = config.stall(stall), config.check(check), config.stall_seconds()
    if _world is None:
        supervised.start()
        MPI = mpi.load()
        spawned.before_start()
        mpi.start(MPI)
        if MPI.COMM_WORLD.size > 1 and isinstance(sys.stdout, io.TextIOWrapper):
            # Each rank's lines at once, but whole: unbuffered, those of several ranks get mixed.
            sys.stdout.reconfigure(line_buffering=True, write_through=False)
        _world = spawned.named(World.of(MPI, MPI.COMM_WORLD))
        binding.start(_world)
        watchdog.start(_world, seconds, stall)
        trace.start(_world)
        check = checks
    if check is not None:
        _world.mark.checks = check == "collectives"
    if abort_on_error:
        abort.install(_world.comm, _world.MPI.Get_processor_name())
    else:
        abort.uninstall()
    binding.tell()  # where warnings are errors, the other ranks end too
    return _world


def rank() -> int:
    """Return the number of this rank, from 0 on. Collective at the first call, as `init`."""
    return current().rank


def size() -> int:
    """Return the number of ranks. Collective at the first call, as `init`."""
    return current().size


def local_rank() -> int:
    """Return the number of this rank among those of its node. Collective as `rank`."""
    return current().local_rank


def local_size() -> int:
    """Return the number of ranks on this node. Collective as `rank`."""
    return current().local_size
