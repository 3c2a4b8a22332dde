"""Executes what all ranks of a process set have submitted, in the order that rank 0 gives."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from mpidl.collectives.coordinator import ADD, REMOVE
from mpidl.collectives.halves import shares
from mpidl.collectives.process_set import ProcessSet, meet
from mpidl.collectives.request import Handle, Item, Request, storage
from mpidl.collectives.sums import Sums
from mpidl.staging import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpidl.array import Array
    from mpidl.collectives.request import Description, Key
    from mpidl.world import World

ALONE_BYTES = 1 << 18  # from here on, a call of its own costs less than packing and unpacking


class Task(NamedTuple):
    """What to know of one operation, each time that it is planned."""

    key: Key
    description: Description
    nbytes: int
    alike: Any  #: equal for those that may be packed together; None for what is not packed


@dataclass
class Step:
    """Neighbours in a plan that are executed by one call."""

    process_set: int
    description: Description  #: of the first
    places: slice  #: in the plan
    views: list[Array]  #: of the packed array, one for each in its shape; none for a single one
    packed: Array | None = None


@dataclass
class Plan:
    """What an answer says to do."""

    keys: list[Key]
    descriptions: list[Description]
    steps: list[Step]


@final
class Executor:
    """Runs plans. Collective: all ranks of a process set run the same steps of it.

    Neighbours that are small, of one process set and dtype, and reduced in one way, are packed to
    one array, of no more than MPI gets in one call: it stays in cache from packing to unpacking.
    """

    def __init__(self, world: World, wait: Callable[[list[Any]], None]) -> None:
        self.world, self._wait = world, wait
        self.sets = {0: ProcessSet(0, tuple(range(world.size)), world)}
        self._sums = Sums()
        #: Told of each step: its handles, and the times (s) at which its parts began and ended.
        self.observer: Callable[[list[Handle], list[float]], None] | None = None
        self._packed: dict[np.dtype[Any], Array] = {}
        self._sets_made = 0

    def plan(self, tasks: Sequence[Task]) -> Plan:
        """Return what to do for `tasks`, which are ordered by process set. Not collective."""
        bounds: list[int] = []  # where a step begins
        last, nbytes = None, 0
        for i, (_, _, size, alike) in enumerate(tasks):
            if alike is None or alike != last or nbytes + size > CHUNK_BYTES:
                bounds.append(i)
                last, nbytes = alike, 0
            nbytes += size
        steps = []
        for start, stop in itertools.pairwise([*bounds, len(tasks)]):
            key, d, _, _ = tasks[start]
            steps.append(Step(key[0], d, slice(start, stop), []))
            if stop - start > 1:
                self._pack(steps[-1], [task.description.shape for task in tasks[start:stop]])
        return Plan([task.key for task in tasks], [task.description for task in tasks], steps)

    def _pack(self, step: Step, shapes: list[tuple[int, ...]]) -> None:
        dtype = storage(step.description.dtype)
        if dtype not in self._packed:
            self._packed[dtype] = np.empty(CHUNK_BYTES // dtype.itemsize, dtype)
        memory, stop = self._packed[dtype], 0
        for shape in shapes:
            start, stop = stop, stop + math.prod(shape)
            step.views.append(memory[start:stop].reshape(shape))
        step.packed = memory[:stop]

    def run(self, plan: Plan, handles: list[Handle]) -> None:
        """Execute a plan for these handles, one for each of its keys. Collective."""
        last = None
        with np.errstate(all="ignore"):
            for step in plan.steps:
                world = self.sets[step.process_set].world
                assert world is not None
                if step.process_set != last:
                    meet(world, self._wait)
                    last = step.process_set
                part, observer = handles[step.places], self.observer
                times = None if observer is None else [time.perf_counter()]
                if step.packed is None:
                    self._single(world, step.description, part[0])
                    part[0].done = times is None
                else:
                    self._together(world, step, step.packed, part, times)
                if observer is not None and times is not None:
                    observer(part, [*times, time.perf_counter()])
                    for handle in part:
                        handle.done = True

    def _together(
        self,
        world: World,
        step: Step,
        packed: Array,
        handles: list[Handle],
        times: list[float] | None,
    ) -> None:
        """Pack, reduce and unpack; `times` gets those between. Handles are done if it is None."""
        arrays: list[Any] = [handle.request.array for handle in handles]
        for view, array in zip(step.views, arrays, strict=True):
            view[...] = array
        if times is not None:
            times.append(time.perf_counter())
        if step.description.kind == "broadcast":
            world.comm.Bcast(packed.view(np.uint8), step.description.root)
        else:
            self._sums.allreduce(world, packed, step.description)
        if times is not None:
            times.append(time.perf_counter())
        done = times is None
        for view, array, handle in zip(step.views, arrays, handles, strict=True):
            array[...] = view
            handle.result = array
            handle.done = done

    def _single(self, world: World, d: Description, handle: Handle) -> None:
        array: Any = handle.request.array
        if d.kind == "allreduce":
            self._sums.allreduce(world, array.reshape(-1), d)
            handle.result = array
        elif d.kind == "broadcast":
            flat = array.reshape(-1).view(np.uint8)
            for start in range(0, flat.size, CHUNK_BYTES):
                world.comm.Bcast(flat[start : start + CHUNK_BYTES], d.root)
            handle.result = array
        elif d.kind == "allgather":
            rows = np.empty(world.size, np.int64)
            world.comm.Allgather(np.array([len(array)]), rows)
            handle.sizes = tuple(rows.tolist())
            handle.result = self._gathered(world, array, None, handle.sizes)
        elif d.kind == "alltoall":
            splits = handle.request.splits or shares(len(array), world.size)
            rows = np.empty(world.size, np.int64)
            world.comm.Alltoall(np.array(splits), rows)
            handle.sizes = tuple(rows.tolist())
            handle.result = self._gathered(world, array, splits, handle.sizes)
        elif d.kind == "reducescatter":
            shape = array.shape[1:]
            rows_of = shares(len(array), world.size)
            width = math.prod(shape)
            counts = [n * width for n in rows_of]
            part = self._sums.reduce_scatter(world, array.reshape(-1), counts, d)
            handle.result = part.reshape(rows_of[world.rank], *shape)
        elif d.kind == ADD:
            handle.result = self._add(tuple(d.splits or ()))
        elif d.kind == REMOVE:
            handle.result = d.root  # it is freed after all that this round does in it

    def _gathered(
        self, world: World, array: Array, splits: Sequence[int] | None, rows: Sequence[int]
    ) -> Array:
        """Return `rows` of other ranks' arrays, those that they split off for this rank."""
        found = np.empty((sum(rows), *array.shape[1:]), array.dtype)
        width = math.prod(array.shape[1:]) * array.itemsize
        if not width:
            return found
        row = world.MPI.BYTE.Create_contiguous(width).Commit()  # MPI's counts end at 2^31
        try:
            arriving = [found, list(rows), row]
            if splits is None:
                world.comm.Allgatherv([array, len(array), row], arriving)
            else:
                world.comm.Alltoallv([array, list(splits), row], arriving)
        finally:
            row.Free()
        return found

    def _add(self, ranks: tuple[int, ...]) -> int:
        self._sets_made += 1
        number = self._sets_made
        self.sets[number] = ProcessSet.of(self.world, number, ranks)
        return number

    def remove(self, number: int) -> None:
        """Free a process set. Collective over its ranks."""
        self.sets.pop(number).free()

    def close(self) -> None:
        """Free what there is. Collective."""
        for number in [number for number in self.sets if number]:
            self.remove(number)


def tasks_of(item: Item) -> list[Task]:
    """Return the operations of an item."""
    found = []
    for key, d in zip(item.keys, item.descriptions, strict=True):
        nbytes = d.nbytes if d.kind in ("allreduce", "broadcast") else ALONE_BYTES
        alike = None
        if nbytes < ALONE_BYTES and d.op != "adasum":
            alike = (item.process_set, *d._replace(shape=()))
        found.append(Task(key, d, nbytes, alike))
    return found


def absent(d: Description) -> Handle:
    """Return a handle of a rank that has joined: zeros, or no rows."""
    shape = (0, *d.shape[1:]) if d.kind == "allgather" else d.shape
    array = None if d.kind == "barrier" else np.zeros(shape, storage(d.dtype))
    return Handle(Request("", d.kind, array, d.dtype))
