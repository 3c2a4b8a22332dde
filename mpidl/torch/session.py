"""The ranks, and the engine that works for them, from `init` to `shutdown`."""

from __future__ import annotations

import atexit
import os
import pickle
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from mpidl import abort, config, signals
from mpidl import world as worlds
from mpidl.collectives import Engine, Request
from mpidl.errors import InvalidArgument, MpidlError, RankMismatch
from mpidl.marks import by_rank, some
from mpidl.refuse import told
from mpidl.torch import process_sets as sets
from mpidl.torch.arguments import is_communicator, wholes
from mpidl.torch.errors import internal, on_all
from mpidl.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpidl.collectives import Handle
    from mpidl.torch.process_sets import ProcessSet

    #: The engine's handle, or a list of such; what makes the operation's result of what they give,
    #: or None; the result, if there is no such function.
    Pending = tuple[Any, Callable[[Any], Any] | None, Any]


class Session:
    """What there is between `init` and `shutdown`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.group = world.comm.Get_group()  #: which outlives the communicator
        self.of_all = world is worlds.current()  #: whether these are all ranks that there are
        self.engine = Engine(world)
        self.submit: Callable[[Request], Handle] = self.engine.submit
        self.submit_all: Callable[[Sequence[Request]], list[Handle]] = self.engine.submit_all
        self.wait: Callable[[Handle], Any] = self.engine.wait
        self.pending: dict[int, Pending] = {}
        self.count = 0  #: of handles
        self.timeline: Any = None
        self.process = os.getpid()
        self._unnamed: defaultdict[int, int] = defaultdict(int)
        self._layers: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._layers_named = 0

    def keep(self, handles: Any, finish: Callable[[Any], Any]) -> int:
        """Return the number under which `synchronize` finds an operation."""
        self.count = number = self.count + 1
        self.pending[number] = (handles, finish, None)
        return number

    def name(self, process_set: int) -> str:
        """Return a name for an operation that has none, the same on all ranks of the set.

        Operations of all kinds are counted together: where ranks take different branches, they
        learn that their operations differ, and do not wait for each other.
        """
        self._unnamed[process_set] = number = self._unnamed[process_set] + 1
        return f"unnamed.{process_set}.{number}"

    def refuse(self, name: str, kind: str, process_set: int, error: MpidlError) -> None:
        """Tell the other ranks of the set, who wait for it, what this rank cannot do its part for.

        Not collective: they raise RankMismatch when they wait, this rank raises `error`.
        """
        with suppress(MpidlError):  # in flight, or the engine is closed
            self.submit(Request(name, kind, process_set=process_set, problem=str(error)))

    def layer(self, module: Any) -> str:
        """Return a name for a module: the same on all ranks, where they first use it in one order.

        What comes under one name again and again costs less than what is unnamed. Errors tell it:
        the path of the module is in it, if it has one, or its class.
        """
        if module not in self._layers:
            self._layers_named += 1
            told = getattr(module, "path", "") or type(module).__name__
            self._layers[module] = f"layer {self._layers_named}, {told}"
        return self._layers[module]

    def gather(self, value: Any, what: str) -> list[Any]:
        """Return the values of all ranks; they can be pickled. Collective.

        Through the engine, so that a rank in `join` hangs nobody. Raises RankMismatch then on the
        others.
        """
        array = np.frombuffer(pickle.dumps(value), np.uint8)
        handle = self.submit(Request(what, "allgather", array))
        data, sizes = bytes(self.wait(handle)), handle.sizes or ()
        joined = [rank for rank, size in enumerate(sizes) if not size]
        if joined:
            raise on_all(RankMismatch(f"{what}: not while {some(joined)} waits in join()"))
        ends = np.cumsum(sizes)
        return [pickle.loads(data[end - n : end]) for end, n in zip(ends, sizes, strict=True)]

    def agree(self, problem: MpidlError | None, what: str) -> None:
        """Do as `World.agree`, through the engine; `what` is a name. Collective."""
        self.gather_well(None, problem, what)

    def gather_well(self, value: Any, problem: MpidlError | None, what: str) -> list[Any]:
        """Return the values of all ranks; raise on all of them any rank's problem. Collective."""
        told = self.gather((value, problem and (type(problem), str(problem))), what)
        found = next((p for _, p in told if p is not None), None)
        if found is not None:
            who = [rank for rank, (_, p) in enumerate(told) if p == found]
            raise on_all(found[0](f"{some(who)}: {found[1]}"))
        return [value for value, _ in told]

    def count_anew(self) -> None:
        """Begin again with names, where ranks may have come to different numbers."""
        self._unnamed.clear()


_session: Session | None = None


def active() -> Session:
    """Return the session. Raises InvalidArgument, a ValueError, before `init`."""
    if _session is None:
        raise InvalidArgument("mpidl.torch is not initialized: call mpidl.torch.init() first")
    return _session


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Start MPI, if it is not running, and the engine. Collective; later calls do nothing.

    Args:
        comm: an mpi4py communicator of the ranks to work with, or a list of ranks of the world,
            which these alone pass; None for all ranks.
        process_sets: sets to add at once; they can be added later too, so "dynamic" is as None.

    Raises on every rank: InvalidArgument for ranks that there are not, RankMismatch where sets
    differ between ranks, and what `mpidl.init` raises.
    """
    global _session
    if _session is not None:
        return
    world = worlds.init()
    abort.watch(world.MPI)
    _session = Session(_world_of(world, comm))
    sets.set_up(_session, comm if is_communicator(comm) else None)
    none = process_sets is None or (isinstance(process_sets, str) and process_sets == "dynamic")
    wanted: Any = [] if none else process_sets
    problem = None
    if not isinstance(wanted, (list, tuple)):
        problem = InvalidArgument(
            f'process_sets={told(wanted)}: expected a list of process sets, or "dynamic"'
        )
    try:
        with internal():
            numbers = _session.gather_well(0 if problem else len(wanted), problem, "init")
            if len({*numbers}) > 1:
                raise on_all(
                    RankMismatch(f"init: {by_rank(dict(enumerate(numbers)))} process sets")
                )
        for process_set in wanted:
            sets.add_process_set(process_set)
    except MpidlError:  # of all ranks: none is initialized
        shutdown()
        raise


def _world_of(world: World, comm: Any) -> World:
    if comm is None or (isinstance(comm, (list, tuple)) and not comm):
        return world
    if is_communicator(comm):
        if comm == world.MPI.COMM_NULL:
            raise InvalidArgument("init(comm): MPI_COMM_NULL")
        return World.of(world.MPI, comm)
    ranks = wholes("init(comm)", comm)
    if world.rank not in ranks or len({*ranks} & {*range(world.size)}) < len(ranks):
        raise InvalidArgument(
            f"init(comm={ranks}) on rank {world.rank} of {world.size}: expected different ranks "
            "of the world, this one among them"
        )
    group = world.comm.Get_group().Incl(ranks)
    return World.of(world.MPI, world.comm.Create_group(group))


def shutdown() -> None:
    """End the engine, after what is on its way. Collective. `init` may be called again."""
    global _session
    if _session is None:
        return
    ended, _session = _session, None
    sets.tear_down()
    try:
        with internal():
            ended.engine.close()
    except ended.world.MPI.Exception as error:
        if not config.fault_tolerant():
            raise
        worlds.revoke(ended.world)  # a rank has died: the others wait for it
        ended.engine.abandon(error)
        abort.end_without_finalizing(ended.world.comm)
    finally:
        if ended.timeline is not None:
            ended.timeline.close()


def _at_exit() -> None:
    """Shut down where the script did not: the others must not wait for this rank.

    A rank that ends by an error ends all the others, and waits for none.
    """
    if abort._guard is not None:
        abort._guard.at_exit()
    if _session is not None and _session.process == os.getpid() and not abort.ends_all():
        shutdown()


atexit.register(_at_exit)  # it runs before MPI's end, and that of the engine's thread


def rebuild(left: World | None = None) -> None:
    """Begin again with new communicators and a new engine, after an error. Collective.

    Operations on their way are forgotten, and process sets made anew. With `left`, the world of
    those that are left of the ranks, these go on; they have other numbers there.
    """
    global _session
    broken = active()
    if left is None:
        with suppress(MpidlError):  # all ranks are here: what has failed is told already
            broken.engine.close()
    else:
        broken.engine.abandon(MpidlError("ranks have died"))
    made = Session(left or broken.world)
    try:
        sets.move(made, broken)
    except BaseException as error:  # another one has died
        made.engine.abandon(error)
        raise
    _session = made
    if broken.timeline is not None:
        broken.timeline.follow(_session)


def stop_requested() -> bool:
    """Return whether any rank got SIGTERM or SIGUSR1: see `mpidl.signals`. Collective.

    `DataParallel.stop_requested` tells the same without a message of its own.
    """
    return bool(active().world.sum([signals.received() is not None])[0])


def is_initialized() -> bool:
    """Return whether `init` was called, and `shutdown` not since."""
    return _session is not None


def rank() -> int:
    """Return this process's rank."""
    return active().world.rank


def size() -> int:
    """Return the number of ranks."""
    return active().world.size


def local_rank() -> int:
    """Return this process's rank among those of its node."""
    return active().world.local_rank


def local_size() -> int:
    """Return the number of ranks on this node."""
    return active().world.local_size


def cross_rank() -> int:
    """Return the place of this node among those that have a rank of this local rank."""
    return len(_crossed(active().world.node))


def cross_size() -> int:
    """Return the number of nodes that have a rank of this local rank."""
    return len(_crossed(active().world.nodes))


def _crossed(stop: int) -> list[int]:
    world = active().world
    return [node for node in range(stop) if len(world.members[node]) > world.local_rank]


def is_homogeneous() -> bool:
    """Return whether all nodes have equally many ranks."""
    return len({len(ranks) for ranks in active().world.members}) == 1


def mpi_threads_supported() -> bool:
    """Return whether several threads may call MPI at once."""
    return active().world.threads


def mpi_enabled() -> bool:
    """Return True: all goes through MPI."""
    return True


def mpi_built() -> bool:
    """Return True: all goes through MPI."""
    return True


def gloo_enabled() -> bool:
    """Return False: nothing goes through Gloo."""
    return False


def gloo_built() -> bool:
    """Return False: nothing goes through Gloo."""
    return False


def nccl_built() -> int:
    """Return 0, Horovod's sign that nothing goes through NCCL."""
    return 0


def ddl_built() -> bool:
    """Return False: nothing goes through IBM's DDL."""
    return False


def ccl_built() -> bool:
    """Return False: nothing goes through oneCCL."""
    return False


def cuda_built() -> bool:
    """Return False: tensors on a GPU travel through host memory."""
    return False


def rocm_built() -> bool:
    """Return False: tensors on a GPU travel through host memory."""
    return False
