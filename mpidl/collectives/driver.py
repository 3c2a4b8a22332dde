"""Brings about what was submitted: in whoever waits, or else in a thread."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpidl import config
from mpidl.collectives.coordinator import REMOVE, Answer, Coordinator
from mpidl.collectives.execute import Executor, Plan, Task, absent, tasks_of
from mpidl.collectives.ids import IDS
from mpidl.collectives.known import FORGOT, Known
from mpidl.collectives.messages import ANSWER, BATCH, pack, unpack
from mpidl.collectives.stall import Stall
from mpidl.collectives.timer import Timer, pause
from mpidl.link import Link
from mpidl.world import NAP_SECONDS

if TYPE_CHECKING:
    from mpidl.collectives.coordinator import Extras
    from mpidl.collectives.request import Handle, Item, Key
    from mpidl.errors import MpidlError
    from mpidl.world import World

GATHER_SECONDS = 2e-3  # for submissions to gather, where nobody waits yet
LONGEST_NAP_SECONDS = 1e-3
PLANS = 32  # kept
JOIN: Key = (-1, "join")
CLOSE: Key = (-1, "close")


class _Stopped(Exception):
    """The process ends, and with it the thread, wherever it is."""


@final
class Driver:
    """Whoever holds the lock drives: sends what is queued, and executes what is answered.

    Whoever waits drives by himself: no thread need be woken for it. The thread is for when nobody
    waits. It sleeps while nothing is in flight; from the first submission on it lets some time
    pass, and then drives with naps, one step at a time, so that a wait gets the lock at once. While
    somebody waits, it sleeps on. Without MPI_THREAD_MULTIPLE there is none. Made collectively.
    """

    def __init__(self, world: World) -> None:
        self.world = world.for_thread()
        self.executor = Executor(self.world, self._await)
        self.in_flight: dict[Key, Handle] = {}
        self.ids: deque[int] = deque()  #: submitted, and not sent yet
        self.items: deque[Item | str] = deque()  #: the same; sent after the ids
        self.known = Known(self.in_flight)
        self.failure: BaseException | None = None
        self.quiet = False  #: whether the thread must be woken
        self.link = Link(self.world)
        self._coordinator = Coordinator(world.size) if world.rank == 0 else None
        self._stall = None
        if self._coordinator is not None:
            self._stall = Stall(self._coordinator, config.stall_seconds())
        self._tasks: dict[int, list[Task]] = {}  # by id
        self._plans: dict[bytes, Plan] = {}
        self._running: list[Handle] = []
        self._joined = self._stop = False
        self._lock = threading.Lock()
        self._timer: Timer | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        if world.threads:
            self._timer = Timer()
            self._thread = threading.Thread(
                target=self._run, args=(self._timer,), name="mpidl engine", daemon=True
            )
            self._thread.start()
        _drivers.add(self)

    def wake(self) -> None:
        """Let the thread begin in a while. Called at the first submission."""
        self.quiet = False
        timer = self._timer
        if timer is not None:
            timer.set(GATHER_SECONDS)

    def join(self) -> None:
        """Take part in what others submit, from the next message on. Not collective."""
        self._joined = True
        self.items.append(JOIN[1])

    def drive(self, handle: Handle) -> None:
        """Drive until `handle` is done."""
        timer = self._timer
        if timer is not None:
            timer.stop()
        try:
            while not handle.done:
                if self._lock.acquire(timeout=LONGEST_NAP_SECONDS):
                    try:
                        self._drive(handle)
                    finally:
                        self._lock.release()
        finally:
            if timer is not None:
                self._rest(timer)

    def _drive(self, handle: Handle) -> None:
        start = time.perf_counter()
        while not handle.done:
            if self._progress():
                start = time.perf_counter()
            elif not handle.done:
                pause(start)

    def _rest(self, timer: Timer) -> None:
        """Say when the thread is to begin again."""
        if self._busy():
            timer.set(GATHER_SECONDS)
            return
        self.quiet = True
        if self._busy():  # something was submitted before this was seen
            self.wake()
        elif self._stall is not None and self._stall.interval < math.inf:
            # a rank 0 that submits nothing may be who is waited for: now and then it looks
            timer.set(self._stall.interval)

    def step(self) -> bool:
        """Drive one step, if nobody else drives; return whether anything came of it."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._progress()
        finally:
            self._lock.release()

    def _progress(self) -> bool:
        """Do what can be done now; the lock is held."""
        try:
            return self._advance()
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            return True

    def fail(self, error: BaseException) -> None:
        """End all that is in flight, and all to come, with an error."""
        self.failure = error
        running, self._running = self._running, []
        for handle in (*running, *self.in_flight.values()):
            if not handle.done:
                handle.error = error
                handle.done = True
        self.in_flight.clear()

    def _advance(self) -> bool:
        if self.failure is not None:
            return False
        if self.known.retired is not None and self.known.forgot():
            self.items.append(FORGOT)
        moved = bool(self.ids or self.items)
        items = _drained(self.items)
        ids = _drained(self.ids)  # after: JOIN or CLOSE must not overtake what came before them
        self.link.settle()
        if self._coordinator is None:
            if moved:
                batch = pack(np.array(ids, np.int32), items or None)
                self.link.send(batch, 0, BATCH)
            found = self.link.receive(0, ANSWER)
            if found is not None:
                self._execute(Answer(*unpack(found[1])))
            return moved or found is not None
        if moved:
            self._take(self._coordinator, 0, np.array(ids, np.int32), items)
        while self.world.size > 1:
            found = self.link.receive(-1, BATCH)
            if found is None:
                break
            moved = True
            self._take(self._coordinator, found[0], *unpack(found[1]))
        if moved:
            self._answer(self._coordinator)
        if self._stall is not None:
            self._stall.look()
        return moved

    def _take(self, coordinator: Coordinator, rank: int, ids: Any, items: Any) -> None:
        told = items or []
        coordinator.submit(rank, ids, [item for item in told if not isinstance(item, str)])
        if JOIN[1] in told:
            coordinator.join(rank)
        if CLOSE[1] in told:
            coordinator.close(rank)
        if FORGOT in told:
            coordinator.forget(rank)

    def _answer(self, coordinator: Coordinator) -> None:
        answers = coordinator.answers()
        messages: dict[int, bytes] = {}  # by id(): most often all ranks get the same
        for rank, answer in answers.items():
            if rank:
                if id(answer) not in messages:
                    messages[id(answer)] = pack(answer.ids, answer.extras)
                self.link.send(messages[id(answer)], rank, ANSWER)
        if 0 in answers:
            self._execute(answers[0])

    def _execute(self, answer: Answer) -> None:
        extras = answer.extras
        if extras is not None:
            self._learn(extras)
        if answer.ids.size:
            plan = self._plan(answer)
            if self._joined:
                pop: Any = self.in_flight.pop
                pairs = zip(plan.keys, plan.descriptions, strict=True)
                handles = [pop(key, None) or absent(d) for key, d in pairs]
            else:
                handles = list(map(self.in_flight.pop, plan.keys))
            self._running = handles
            self.executor.run(plan, handles)
            self._running = []
            if extras is not None:
                for d in plan.descriptions:
                    if d.kind == REMOVE:
                        self.executor.remove(d.root)
                        self.known.remove(d.root)
        if extras is None:
            return
        if extras.retired:
            self._retire(extras.retired)
        if extras.joined is not None:
            self._joined = False
            self._finish(JOIN, extras.joined)
        if extras.closed:
            self._finish(CLOSE, None)

    def _retire(self, ids: list[int]) -> None:
        """Submit nothing more by these ids."""
        gone = set(ids)
        self.known.retire(gone, [task.key for i in ids for task in self._tasks.pop(i, ())])
        for plan in [plan for plan in self._plans if np.isin(np.frombuffer(plan, "i4"), ids).any()]:
            del self._plans[plan]

    def _learn(self, extras: Extras) -> None:
        """Take in what ids stand for, and what was wrong."""
        for i, item in extras.definitions:
            self.known.learn(i, item)
            if i < IDS and i in self._tasks:  # plans keep no others
                self._plans.clear()
            self._tasks[i] = tasks_of(item)
        for keys, (kind, text) in extras.errors:
            error: MpidlError = kind(text)
            error.collective = True
            mine = keys.get(self.world.rank, [])
            self.known.refuse(mine)
            for key in mine:
                handle = self.in_flight.pop(key, None)
                if handle is not None:
                    handle.error = error
                    handle.done = True

    def _plan(self, answer: Answer) -> Plan:
        """Return what these ids stand for; kept where they stand for it next time, too."""
        key = answer.ids.tobytes()
        plan = self._plans.get(key)
        if plan is None:
            tasks = [task for i in answer.ids.tolist() for task in self._tasks[i]]
            plan = self.executor.plan(tasks)
            if answer.ids.max() < IDS:
                if len(self._plans) >= PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        return plan

    def _finish(self, key: Key, result: Any) -> None:
        handle = self.in_flight.pop(key, None)
        if handle is not None:
            handle.result = result
            handle.done = True

    def _await(self, requests: list[Any]) -> None:
        """Complete `requests` as `World.wait` does, but for where this process ends."""
        done = self.world.MPI.Request.Testall
        start = time.perf_counter()
        while not done(requests):
            if self._stop:
                raise _Stopped
            pause(start)

    def _busy(self) -> bool:
        listens = self._coordinator is not None and self._coordinator.listens
        waits = bool(self.in_flight) or listens or not self.link.settled
        return self.failure is None and waits

    def _run(self, timer: Timer) -> None:
        """Drive while nobody else does; in the thread."""
        nap = NAP_SECONDS
        self._rest(timer)
        while not self._stop:
            timer.sleep()
            nap = NAP_SECONDS if self.step() else min(2 * nap, LONGEST_NAP_SECONDS)
            if self._busy():
                timer.set(nap)
            elif not self._stop:
                self._rest(timer)
                nap = NAP_SECONDS

    def stop(self) -> None:
        """End the thread, whatever is in flight. Not collective."""
        self._stop = True
        thread, timer = self._thread, self._timer
        if thread is None or timer is None or self._process != os.getpid():
            return
        while thread.is_alive() and thread is not threading.current_thread():
            timer.set(NAP_SECONDS)  # again: it may itself have set another time
            thread.join(timeout=0.1)
        if not thread.is_alive():
            self._timer = None
            timer.close()

    def free(self) -> None:
        """Give the communicators back, after `stop`. Collective."""
        while not self.link.settle():
            time.sleep(NAP_SECONDS)
        self.executor.close()
        self.link.free()
        self.world.local.Free()
        self.world.comm.Free()


def _drained(found: deque[Any]) -> list[Any]:
    """Take out what is there; others may append meanwhile."""
    return [found.popleft() for _ in range(len(found))]


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _stop_all() -> None:  # no thread may outlive MPI_Finalize
    for driver in list(_drivers):
        driver.stop()


atexit.register(_stop_all)
