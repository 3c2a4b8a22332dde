"""Tells who waits for whom where a job has come to a halt, and ends it.

Each rank has a thread that looks, once a second, at what its rank is waiting in (`marks`). One that
sees a wait last for the limit tells rank 0's thread (or, where that one does not answer, the next
one's), which asks all others what they do, and prints one report (`hang`). The messages go over a
communicator of their own, from thread to thread: whatever the rank itself is stuck in, MPI still
carries them, as long as it may be called by several threads (MPI_THREAD_MULTIPLE).
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, final

from mpidl import abort, marks, supervised
from mpidl.errors import MpidlError
from mpidl.hang import Halt, Place, State, Wait
from mpidl.link import Link
from mpidl.trace import session as trace

if TYPE_CHECKING:
    from mpidl.marks import Mark
    from mpidl.world import World

STATUS = 76  #: of a job that was ended because it had come to a halt
LOOK_SECONDS = 1.0
QUICK_SECONDS = 0.02  # from look to look while answers are on their way
ANSWER_SECONDS = 5.0  # that a rank has to answer
PAUSE_SECONDS = 5.0  # a look that comes so late: this process itself was stopped, and all may be
NAP_SECONDS = 1e-4, 5e-2  # the first and the longest, at the end
TAG = 1
WAITING, HEARD, ASK, ANSWER = range(4)  # kinds of messages

_watchdog: Watchdog | None = None
_asked: tuple[float, str] | None = None  # the arguments of `start`


def start(world: World, seconds: float, action: str) -> None:
    """Watch this rank from now on; rank 0's arguments count. Collective.

    Args:
        world: all ranks, for their own thread of computing.
        seconds: how long a call may wait before it is told; 0: for ever.
        action: "abort" or "warn": whether to end the job.
    """
    global _watchdog, _asked
    _asked = seconds, action
    if _watchdog is not None:
        _watchdog.release()
    _watchdog = Watchdog(world, seconds, action) if world.size > 1 else None
    supervised.tell_size(world.size)


def again(world: World) -> None:
    """Watch with the same settings, in another world. Collective."""
    if _asked is not None:
        start(world, *_asked)


@final
class Watchdog(threading.Thread):
    """The thread of one rank."""

    def __init__(self, world: World, seconds: float, action: str) -> None:
        super().__init__(name="mpidl watchdog", daemon=True)
        mine = Place(world.MPI.Get_processor_name(), os.getpid()), seconds, action
        told = world.comm.allgather(mine)
        self.places = {rank: place for rank, (place, *_) in enumerate(told)}
        _, self.limit, action = told[0]
        self.ends = action == "abort"
        self.rank, self.size, self.mark, self.MPI = world.rank, world.size, world.mark, world.MPI
        self.process = os.getpid()
        self.ended = False
        self.link = Link(world) if world.threads else None
        self.interval = min(LOOK_SECONDS, self.limit / 4)
        self.answer_seconds = min(ANSWER_SECONDS, max(1.0, self.limit))
        self._seen: dict[Mark, tuple[tuple[int, int], float]] = {}  # calls and progress, since when
        self._stopping = threading.Event()
        # MPI_Finalize deletes the attributes of MPI_COMM_SELF first (MPI-4.1, section 11.2.4)
        self._key = self.MPI.Comm.Create_keyval(delete_fn=lambda *_: self.leave())
        self.MPI.COMM_SELF.Set_attr(self._key, self)
        abort.watch(self.MPI)
        self._collector = 0  # the rank to tell
        self._told_at: float | None = None  # when it was told, until it has answered
        self._due = self.limit  # seconds of waiting, when to tell it the next time
        self._states: dict[int, State] = {}  # answers
        self._deadline: float | None = None  # for them, where this rank has asked
        self._known: set[tuple[int, int]] = set()  # the halt of the last report
        self._report_due = 0.0  # seconds of waiting, when to repeat it
        if self.limit:
            self.start()

    def run(self) -> None:
        """Look, until it is stopped."""
        last = time.monotonic()
        try:
            while not self._stopping.wait(
                self.interval if self._deadline is None else QUICK_SECONDS
            ):
                now = time.monotonic()
                if now - last > self.interval + PAUSE_SECONDS:
                    self._seen.clear()
                last = now
                self._look(now)
        except Exception:  # MPI has failed, as where a rank has died; whoever uses it will tell
            return

    def _look(self, now: float) -> None:
        waits = self._waits(now)
        while self.link is not None and (found := self.link.receive(-1, TAG)) is not None:
            self._hear(*found, now)
        longest = max((wait.seconds for wait in waits), default=0.0)
        if longest < self.limit:
            self._collector, self._told_at, self._due = 0, None, self.limit
        elif self._told_at is not None:
            if now - self._told_at > self.answer_seconds:
                self._collector += 1  # that one does not answer
                self._tell(now)
        elif longest >= self._due:
            self._due = longest + self.limit
            self._tell(now)
        complete = len(self._states) == self.size - 1
        if self._deadline is not None and (complete or now > self._deadline):
            self._deadline = None
            self._conclude(now)
        if self.link is not None:
            self.link.settle()

    def _tell(self, now: float) -> None:
        if self.link is None or self._collector >= self.rank:
            self._told_at = None
            self._ask(now)
        else:
            self._told_at = now
            self._send(self._collector, WAITING)

    def _hear(self, sender: int, message: bytearray, now: float) -> None:
        kind, state = pickle.loads(message)
        if kind == WAITING:
            self._send(sender, HEARD)
            self._ask(now)
        elif kind == HEARD:
            self._told_at = None
        elif kind == ASK:
            self._send(sender, ANSWER, self.state(now))
        elif self._deadline is not None:
            self._states[sender] = state

    def _ask(self, now: float) -> None:
        """Ask all other ranks what they do."""
        if self._deadline is not None:
            return
        self._states, self._deadline = {}, now
        if self.link is not None:
            self._deadline += self.answer_seconds
            for rank in range(self.size):
                if rank != self.rank:
                    self._send(rank, ASK)

    def _send(self, rank: int, kind: int, state: State | None = None) -> None:
        assert self.link is not None
        self.link.send(pickle.dumps((kind, state)), rank, TAG)

    def _conclude(self, now: float) -> None:
        """Print a report, where it is time, and end the job."""
        states = {**self._states, self.rank: self.state(now)}
        silent = {r: self._looks(r) for r in range(self.size) if r not in states}
        halt = Halt(states, silent, self.limit, asked=self.link is not None)
        if halt.seconds < self.limit or halt.debugged:
            return
        over = self.ends and halt.seconds >= halt.patience
        if not (self._known & halt.key()):
            self._report_due = 0.0
        if halt.seconds >= self._report_due or over:
            self._known, self._report_due = halt.key(), 2 * halt.seconds
            text = halt.report(self.places, ends=self.ends)
            text += f"mpidl: the job is ended, with exit status {STATUS}\n" * over
            os.write(2, text.encode(errors="replace"))  # in one piece, also beside other ranks
        if over:
            self._abort()

    def _abort(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        if self.link is None:  # MPI is another thread's: the launcher ends the others
            os._exit(STATUS)
        abort.note_status(STATUS, last=True)
        self._end_spawned()
        self.mark.comm.Abort(STATUS)

    def _end_spawned(self) -> None:
        """Kill this host's ranks that MPI_Abort leaves alone: those of other MPI_COMM_WORLDs."""
        MPI, group = self.MPI, self.mark.comm.Get_group()
        places = group.Translate_ranks(None, MPI.COMM_WORLD.Get_group())
        for rank, place in enumerate(places):
            if place == MPI.UNDEFINED and self.places[rank].host == self.places[self.rank].host:
                with suppress(OSError):
                    os.kill(self.places[rank].process, signal.SIGKILL)

    def _waits(self, now: float) -> list[Wait]:
        """Return what this rank waits in, the longest wait first."""
        seen, self._seen, waits = self._seen, {}, []
        for mark in marks.everywhere():
            call, place = mark.told(), (mark.calls, mark.progress)
            if not call:
                continue
            before, since = seen.get(mark, (None, now))
            since = since if before == place else now
            self._seen[mark] = place, since
            wait = Wait(call, mark.calls, now - since, self._ranks(mark))
            waits.append(wait)
        return sorted(waits, key=lambda wait: -wait.seconds)

    def _ranks(self, mark: Mark) -> tuple[int, ...] | None:
        """Return the members of a group, as ranks of the whole world; None for all of it."""
        comm = mark.comm
        if self.link is None or comm is None or comm.size == self.size:
            return None
        group = comm.Get_group()
        return tuple(group.Translate_ranks(None, self.mark.comm.Get_group()))

    def state(self, now: float) -> State:
        """Return what this rank does."""
        frame = marks.main_frame()
        return State(
            waits=() if self.ended else tuple(self._waits(now)),
            calls=self.mark.calls,
            site=marks.site(frame),
            stack=tuple(marks.stack(frame)),
            ended=self.ended,
            debugged=marks.in_debugger(frame),
        )

    def _looks(self, rank: int) -> str:
        """Return what the system says of a process that does not answer, if it is of this host."""
        place = self.places[rank]
        if place.host != self.places[self.rank].host:
            return ""
        try:  # "PID (NAME) STATE ...", of proc_pid_stat(5)
            letter = Path(f"/proc/{place.process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "its process is gone"
        return {"T": "it is stopped", "t": "in a debugger", "Z": "its process is gone"}.get(
            letter, ""
        )

    def leave(self) -> None:
        """Wait for all ranks to come to their end, and stop. Collective.

        Here, and not in MPI_Finalize, where nobody could be asked any more.
        """
        if os.getpid() != self.process:  # a child's end
            return
        if abort.ends_all() or self.ended or self.MPI.Is_finalized():
            self.stop()
            return
        self.ended = True
        if self.mark.checks:
            self.mark.enter("no more call")
        if self.link is not None and self.limit:
            request, nap = self.mark.comm.Ibarrier(), NAP_SECONDS[0]
            while not request.Test():
                time.sleep(nap)
                nap = min(1.1 * nap, NAP_SECONDS[1])
        trace.leave(self.MPI, self.mark.comm)
        self.stop()

    def stop(self) -> None:
        """Watch no more. Not collective."""
        self._stopping.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join()

    def release(self) -> None:
        """Watch no more, and give back what that took: ranks have died. Not collective."""
        self.stop()
        self.ended, link, self.link = True, self.link, None
        if self._key != self.MPI.KEYVAL_INVALID:
            self.MPI.COMM_SELF.Delete_attr(self._key)
            self._key = self.MPI.Comm.Free_keyval(self._key)
        with suppress(self.MPI.Exception):  # of messages to the dead
            if link is not None and link.settle():
                link.free()


def _end() -> None:
    if _watchdog is None:
        return
    try:
        _watchdog.leave()
    except MpidlError as error:  # the other ranks make another call; this is no uncaught one yet
        sys.excepthook(type(error), error, error.__traceback__)
    except (Exception, KeyboardInterrupt):  # of MPI, as where a rank has died
        _watchdog.stop()


# at this module's import: of all that mpidl does at the end, the last but what its imports do
atexit.register(_end)
