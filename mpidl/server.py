"""A server's thread, beside the training of its rank, and how the ranks part from it."""

from __future__ import annotations

import atexit
import copy
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import abort
from mpidl.array import UPDATE_BLOCK_BYTES, blocks, to_numpy
from mpidl.errors import InvalidArgument
from mpidl.optim.base import Layers, check_used, rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.array import Array, Averages
    from mpidl.bucket import Bucket
    from mpidl.optim import Optimizer
    from mpidl.optim.clip import Clip
    from mpidl.world import World

REQUEST, GRADIENT, ANSWER, PARAMETERS, PROBLEM = range(1, 6)  # tags
PUSH, PULL, LEAVE = range(3)  # requests
APPLIED, LATE, FAILED = range(3)  # answers
SHORT_NAP, LONG_NAP = 5e-5, 1e-3  # seconds, between looks for messages
AT_ONCE = 2  # ranks served: one sends while the other receives


class Part:
    """A server's part of one bucket: the parameters that count, and their optimizer's state."""

    def __init__(self, flat: Bucket, part: slice, optimizer: Optimizer, clip: Clip) -> None:
        self.param = to_numpy(flat.param)[part].copy()
        self.optimizer, self.clip = optimizer, clip
        self.state = optimizer.init(self.param)
        self._whole = self.param.size == flat.param.size
        wholes = list(flat.slices().values())
        self._layers = Layers(flat.parts(part), self._total, wholes, part.start)

    def update(self, grad: Array, updates: int, ranks: int) -> None:
        """Make one update with a gradient (n,), which is spoiled, after `updates` others."""
        optimizer: Any = copy.copy(self.optimizer)
        optimizer.lr = rate(self.optimizer, optimizer.lr, updates // ranks) / ranks
        averages = self._blocks(grad)
        optimizer.update(self.param, grad, self.state, updates, self._layers, averages)
        check_used(self.optimizer, averages)

    def _blocks(self, grad: Array) -> Averages:
        for part in blocks(grad, UPDATE_BLOCK_BYTES):
            self.clip.finish(grad[part], 1.0)
            yield part, grad[part]

    def _total(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        if not self._whole:
            raise InvalidArgument(
                f"{self.optimizer} asks for norms over whole parameters, which several servers "
                "that wait for nobody do not have: use servers=1"
            )
        return np.array(values, np.float64)


class Server:
    """What a server holds, and the thread in which it serves the other ranks.

    At most `bound` updates may lie between handing out parameters and a gradient made from them.
    """

    def __init__(self, world: World, parts: list[Part], bound: int) -> None:
        self.world, self.parts, self.bound = world, parts, bound
        self.updates = 0
        self.staleness: Counter[int] = Counter()
        self.error: Exception | None = None
        self._full = [part for part in parts if part.param.size]
        self._lock = threading.Lock()  # this rank's own pushes come in its own thread
        others = [rank for rank in range(world.size) if rank != world.rank]
        self._free = [
            [np.empty_like(part.param) for part in self._full]
            for _ in range(min(AT_ONCE, len(others)))
        ]  # memory for a rank's gradients, and then for its new parameters
        self.thread = threading.Thread(
            target=self._run, args=(others,), name="mpidl server", daemon=True
        )
        self.thread.start()

    def serve(
        self, request: int, version: int, grads: Sequence[Array], params: Sequence[Array]
    ) -> tuple[int, int]:
        """Take gradients, which are spoiled, and fill in the newest parameters.

        `version` is the number of updates that made those which the gradients were computed from.
        Returns the answer, and the number of updates that made the new ones.
        """
        with self._lock:
            answer = APPLIED
            if request == PUSH and self.error is None:
                answer = self._push(version, grads)
            for part, param in zip(self._full, params, strict=True):
                param[:] = part.param
            return answer if self.error is None else FAILED, self.updates

    def restart(self, params: Sequence[Array]) -> None:
        """Replace the parameters of all parts."""
        with self._lock:
            for part, param in zip(self.parts, params, strict=True):
                part.param[:] = param

    def _push(self, version: int, grads: Sequence[Array]) -> int:
        age = self.updates - version
        if age > self.bound:
            return LATE
        try:
            for part, grad in zip(self._full, grads, strict=True):
                part.update(grad, self.updates, self.world.size)
        except Exception as error:  # told to whoever asks: a thread has nobody to raise it to
            self.error = error
            return FAILED
        self.staleness[age] += 1
        self.updates += 1
        return APPLIED

    def _run(self, ranks: Sequence[int]) -> None:
        """Serve until all have left; in the thread. Sleeps while there is nothing to do."""
        waiting = {talk: next(talk) for talk in map(self._talk, ranks)}
        nap = SHORT_NAP
        while waiting:
            moved = False
            for talk, requests in list(waiting.items()):
                if self.world.MPI.Request.Testall(requests):
                    moved |= bool(requests)
                    following = next(talk, None)
                    if following is None:
                        del waiting[talk]
                    else:
                        waiting[talk] = following
            nap = SHORT_NAP if moved else min(2 * nap, LONG_NAP)
            time.sleep(0 if moved else nap)

    def _talk(self, rank: int) -> Iterator[list[Any]]:
        """Serve one rank until it leaves; yields what must be complete before it goes on."""
        comm = self.world.comm
        asked = np.empty(2, np.int64)
        while True:
            yield [comm.Irecv(asked, rank, REQUEST)]
            request, version = asked.tolist()
            if request == LEAVE:
                return
            while not self._free:
                yield []
            memory = self._free.pop()
            if request == PUSH:
                yield [comm.Irecv(grad, rank, GRADIENT) for grad in memory]
            answer = self.serve(request, version, memory, memory)
            sends = [comm.Isend(np.array(answer), rank, ANSWER)]
            sends += [comm.Isend(param, rank, PARAMETERS) for param in memory]
            if answer[0] == FAILED:
                sends.append(comm.isend(self._problem(), rank, PROBLEM))
            yield sends
            self._free.append(memory)

    def _problem(self) -> tuple[type[Exception], str]:
        error, place = self.error, f"the server, rank {self.world.rank}"
        if isinstance(error, InvalidArgument):
            return InvalidArgument, f"{place}: {error}"
        return RuntimeError, f"{place}: {type(error).__name__}: {error}"


@dataclass(eq=False)
class Member:
    """One rank's part in a service. It may outlast the model, for the sake of other ranks."""

    world: World  #: for the thread
    roots: list[int]
    server: Server | None
    _requests: list[Any] = field(default_factory=list)
    _left: bool = False
    _process: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        _members[:] = [member for member in _members if not member.over()]
        _members.append(self)
        abort.watch(self.world.MPI)

    def leave(self) -> None:
        """Tell the servers that nothing more will come. Not collective."""
        if not self._left:
            self._left = True
            farewell = np.array([LEAVE, 0])
            others = [root for root in self.roots if root != self.world.rank]
            self._requests = [self.world.comm.Isend(farewell, root, REQUEST) for root in others]

    def over(self) -> bool:
        """Return whether nothing is left to do."""
        served = self.server is None or not self.server.thread.is_alive()
        return self._left and served and self.world.MPI.Request.Testall(self._requests)

    @property
    def here(self) -> bool:
        """Whether this is the process that is a member, and MPI still runs."""
        return self._process == os.getpid() and not self.world.MPI.Is_finalized()

    def end(self) -> None:
        """Wait until all ranks have left."""
        self.world.wait(self._requests)
        if self.server is not None:
            self.server.thread.join()


_members: list[Member] = []


def _end() -> None:
    """Leave all services, and serve until all others have: no thread may outlive MPI_Finalize.

    Not where this rank ends by an error: then the job ends, and nobody needs waiting for. Nor in a
    forked child, which is no rank.
    """
    failed = abort.ends_all() and not abort.leaving()
    members = [] if failed else [member for member in _members if member.here]
    for member in members:
        member.leave()
    for member in members:
        member.end()


# Before `mpidl.init` registers `abort`'s own handler, which so runs first, and ends the job if it
# must; and both run before mpi4py calls MPI_Finalize.
atexit.register(_end)
