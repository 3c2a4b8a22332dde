"""The engine: what a rank calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl.collectives.coordinator import ADD, REMOVE
from mpidl.collectives.driver import CLOSE, JOIN, Driver
from mpidl.collectives.request import Description, Handle, Item, Request, describe, signature
from mpidl.errors import InvalidArgument
from mpidl.making import noted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpidl.world import World


@final
class Engine:
    """Collectives that each rank submits by name, in its own order, and waits for later.

    Each rank tells rank 0 what it has submitted, in batches. Rank 0 answers once all ranks of the
    process set have, in one order for all ranks and process sets, in which they execute it. So no
    rank waits in one collective while another one waits in a different one. What does not fit
    together ends with the same error on all ranks, when they wait for it, and the engine goes on.

    All progress is made in `wait` and `poll`, and while nobody calls these, with
    MPI_THREAD_MULTIPLE, in a thread. Made collectively.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._driver = Driver(world)
        noted(self._driver.link.comm)
        self._in_flight, self._known = self._driver.in_flight, self._driver.known.ids
        self._ids = self._driver.ids
        self._sets_asked, self._closed = 0, False

    def submit(self, request: Request) -> Handle:
        """Begin with an operation; returns at once. Not collective.

        Raises InvalidArgument where its name is in flight already, or this rank is not in the
        process set. All else that is wrong is raised by `wait`, on all ranks.
        """
        if request.group is not None:
            return self.submit_all([request])[0]
        handle = Handle(request)
        key = (request.process_set, request.name)
        if self._in_flight.setdefault(key, handle) is not handle:
            raise self._taken(request)
        known = self._known.get(key)  # after: see `Known.retire`
        # the usual case: as the last time, which all ranks know by a number
        array: Any = request.array
        if (
            known is None
            or array.__class__ is not np.ndarray
            or known[1] != signature(request)
            or not array.flags.carray
        ):
            self._in_flight.pop(key, None)  # a driver that has failed forgets them all
            self._submit_new([request], [handle])
            return handle
        self._ids.append(known[0])
        if self._driver.quiet:
            self._driver.wake()
        if self._driver.failure is not None:
            self._driver.fail(self._driver.failure)
        return handle

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Begin with several. Those of one group are executed together, or not at all.

        The requests of a group are of one process set, and in one order on all ranks.
        """
        handles: list[Handle] = []
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            if request.group is None:
                handles.append(self.submit(request))
            else:
                handles.append(Handle(request))
                groups.setdefault(request.group, []).append(i)
        for places in groups.values():
            self._submit_new([requests[i] for i in places], [handles[i] for i in places])
        return handles

    def poll(self, handle: Handle) -> bool:
        """Return whether it is done. Makes progress, and waits for no rank that is late."""
        if not handle.done:
            self._driver.step()
        return handle.done

    def wait(self, handle: Handle) -> Any:
        """Return the result, or raise what was wrong, the same on all ranks of the process set.

        allreduce and broadcast: the array. allgather and alltoall: a new array, with the rows of
        all ranks in their order; how many of each, in `handle.sizes`. reducescatter: a new array,
        this rank's rows of the result: as many for each rank as can be, one more for the first
        ones. barrier: None. Raises RankMismatch, and InvalidArgument for what is wrong everywhere.
        """
        if not handle.done:
            self._driver.drive(handle)
        if handle.error is not None:
            raise handle.error
        return handle.result

    def join(self) -> int:
        """Wait until all ranks have joined; returns the last one to do so. Collective.

        Until then this rank takes part in what others submit: with zeros in allreduce and
        reducescatter, and so in a mean that is still over all ranks of the process set; with no
        rows in allgather. Raised on the others: a broadcast from here, an alltoall, what is reduced
        by min, max or product, which zeros would spoil, and a change of process sets.
        """
        handle = self._control(JOIN)
        self._driver.join()
        if self._driver.quiet:
            self._driver.wake()
        joined: int = self.wait(handle)
        return joined

    def add_process_set(self, ranks: Sequence[int]) -> int:
        """Make a process set of `ranks`, in the world's order, and return its id. Collective.

        Raises RankMismatch where the ranks do not give the same, InvalidArgument.
        """
        members = tuple(sorted(int(rank) for rank in ranks))
        size, problem = self.world.size, None
        if (
            not members
            or len(set(members)) < len(members)
            or not 0 <= members[0] <= members[-1] < size
        ):
            problem = f"ranks {members}: expected some of 0 to {size - 1}, each once"
        number: int = self._change(ADD, members, 0, problem)
        return number

    def remove_process_set(self, id: int) -> None:  # noqa: A002
        """Remove a process set; what is pending in it ends with an error. Collective."""
        self._change(REMOVE, None, id, None)

    def ranks_of(self, id: int) -> tuple[int, ...]:  # noqa: A002
        """Return the ranks of a process set, whose ranks within it are their places here."""
        return self._set(id).ranks

    def observe(self, observer: Callable[[list[Handle], list[float]], None] | None) -> None:
        """Let `observer` be told of what is executed, before it is done. Not collective.

        It gets the handles of operations that were executed as one, and times (s, those of
        time.perf_counter): begin and end; where they were packed, also those of the call between.
        It is called by whichever thread makes progress, and is to wait for nothing.
        """
        self._driver.executor.observer = observer

    def close(self) -> None:
        """Finish what is in flight, or raise in it what can no more be finished. Collective."""
        if self._closed:
            return
        if self._driver.failure is None:
            handle = self._control(CLOSE)
            self._driver.items.append(CLOSE[1])
            self._driver.drive(handle)
        self._closed = True
        self._driver.stop()
        if self._driver.failure is None:
            self._driver.failure = InvalidArgument("the engine is closed")
            self._driver.free()

    def abandon(self, error: BaseException) -> None:
        """End at once, and what is in flight with `error`: ranks have died. Not collective."""
        self._closed = True
        self._driver.stop()
        self._driver.fail(error)

    def _submit_new(self, requests: list[Request], handles: list[Handle]) -> None:
        """Submit what is one item: with all that there is to know of it, or by its id."""
        driver, process_set = self._driver, requests[0].process_set
        if driver.failure is not None:
            raise driver.failure
        if any(request.process_set != process_set for request in requests):
            raise InvalidArgument("a group: expected requests of one process set")
        found = self._set(process_set)
        if found.world is None:
            raise InvalidArgument(f"process set {process_set}: rank {self.world.rank} is not in it")
        keys = tuple((process_set, request.name) for request in requests)
        descriptions = tuple(describe(request, len(found.ranks)) for request in requests)
        for request, key, handle in zip(requests, keys, handles, strict=True):
            if self._in_flight.setdefault(key, handle) is not handle:
                for other, h in zip(keys, handles, strict=True):
                    if self._in_flight.get(other) is h:
                        del self._in_flight[other]
                raise self._taken(request)
        offered: Any = None
        if not any(d.problem or d.kind == "barrier" for d in descriptions):
            signatures = tuple(map(signature, requests))
            offered = signatures if len(keys) > 1 else signatures[0]
        known = self._known.get(keys if len(keys) > 1 else keys[0])
        if known is not None and known[1] == offered:
            self._ids.append(known[0])
        else:
            names = tuple(request.name for request in requests)
            if offered is not None:
                driver.known.offered[keys] = offered
            driver.items.append(Item(process_set, names, descriptions, requests[0].group))
        if driver.quiet:
            driver.wake()

    def _change(
        self, kind: str, ranks: tuple[int, ...] | None, root: int, problem: str | None
    ) -> Any:
        self._sets_asked += 1  # the same on all ranks
        name = f"{kind} {self._sets_asked}"
        handle = Handle(Request(name, kind))
        if self._driver.failure is not None:
            raise self._driver.failure
        self._in_flight[0, name] = handle
        told = Description(kind, "", (), "", root, 1.0, 1.0, ranks, "", problem)
        self._driver.items.append(Item(0, (name,), (told,)))
        if self._driver.quiet:
            self._driver.wake()
        return self.wait(handle)

    def _control(self, key: tuple[int, str]) -> Handle:
        handle = Handle(Request(key[1], key[1]))
        if self._driver.failure is not None:
            raise self._driver.failure
        if self._in_flight.setdefault(key, handle) is not handle:
            raise InvalidArgument(f"{key[1]}: begun already")
        return handle

    def _set(self, number: int) -> Any:
        found = self._driver.executor.sets.get(number)
        if found is None:
            raise InvalidArgument(f"process set {number}: expected one that was added")
        return found

    def _taken(self, request: Request) -> InvalidArgument:
        return InvalidArgument(
            f"{request.name!r} is in flight already: wait for it first, or take another name"
        )
