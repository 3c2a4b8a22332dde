"""The thread that keeps a supervised rank's lease: see mpidl/supervised.py.

One TCP connection for each rank, with a line of JSON for each message. Nothing of it is executed.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from mpidl import abort, config, launched
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS = 77  #: of a rank without a lease
PING_SECONDS = 0.5
LATE_SECONDS = 1.5  # a look that comes so late: this process did not run, or held the interpreter
CONNECT_SECONDS = 20.0  # to reach the supervisor at the start
TRY_SECONDS = 2.0  # for one of its addresses
LINE_BYTES = 4096  # of a message, at most
TCP_THIN_LINEAR_TIMEOUTS = 16  # of linux/tcp.h: what a cut link has lost is sent again sooner


def clock() -> float:
    """Return seconds, of a clock that goes on while the machine sleeps (Linux)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@final
class Lease:
    """Until when a rank may go on. All times in seconds, of one clock."""

    def __init__(self, seconds: float, asked: float) -> None:
        self.seconds = seconds
        self.until = asked + seconds  #: the lease itself: what is written must be written before
        self._grace = self._looked = asked
        self._asked: dict[int, float] = {}  # when, by the number of the ping
        self._number = 0

    def ask(self, now: float) -> int:
        """Return the number of a new ping."""
        self._number += 1
        self._asked[self._number] = now
        return self._number

    def answer(self, number: int) -> None:
        """Note the answer to a ping. To those before it none is awaited any more."""
        if number in self._asked:
            self.until = max(self.until, self._asked[number] + self.seconds)
            self._asked = {n: at for n, at in self._asked.items() if n > number}

    def look(self, now: float) -> bool:
        """Return whether to go on.

        Where this process did not run for a while, or code held the interpreter, it was not the
        supervisor that was silent: it may ask anew, but not write until it has an answer.
        """
        if now - self._looked > LATE_SECONDS:
            self._grace = now + self.seconds
        self._looked = now
        return now < max(self.until, self._grace)


@final
class Keeper(threading.Thread):
    """Keeps the lease, and tells the supervisor what this rank comes to.

    `steps` returns how many there were. Making one raises MpidlError where the supervisor cannot be
    reached, and ends this process where its attempt is over.
    """

    def __init__(self, found: config.Supervisor, seconds: float, steps: Callable[[], int]) -> None:
        super().__init__(name="mpidl supervised", daemon=True)
        self._steps = steps
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._incoming, self._outgoing = b"", b""
        self.ended = threading.Event()  # the supervisor knows of the end
        self._link, asked = self._connect(found)
        self.lease = Lease(seconds, asked)

    def _connect(self, found: config.Supervisor) -> tuple[socket.socket, float]:
        """Return a connection to the supervisor, and when it was asked whether this rank may go on.

        Raises MpidlError.
        """
        hello = {
            "token": found.token,
            "attempt": found.attempt,
            "rank": launched.rank(),
            "host": socket.gethostname()[:255],
            "process": os.getpid(),
        }
        end, reasons = time.monotonic() + CONNECT_SECONDS, {}
        while time.monotonic() < end:
            for address in found.addresses:
                try:
                    link = socket.create_connection((address, found.port), TRY_SECONDS)
                    with suppress(OSError):
                        link.setsockopt(socket.IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1)
                    asked = clock()
                    link.sendall(_line(hello))
                    while b"\n" not in self._incoming and len(self._incoming) < LINE_BYTES:
                        part = link.recv(LINE_BYTES)
                        if not part:
                            raise OSError("it closed the connection")
                        self._incoming += part
                    self._hear()
                    link.setblocking(False)
                    return link, asked
                except OSError as error:  # noqa: PERF203  # of a few addresses
                    reasons[address], self._incoming = str(error), b""
            time.sleep(PING_SECONDS)
        told = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
        raise MpidlError(
            f"cannot reach the supervisor of mpidl run --restarts at port {found.port} ({told}): "
            "expected that hosts may connect to each other's ports, as MPI itself needs it"
        )

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, from any thread; returns at once."""
        with self._lock:
            self._outgoing += _line(message)
        with suppress(BlockingIOError):
            self._wake.send(b"x")

    def run(self) -> None:
        """Ask, until the end is known."""
        due = clock()
        while not self.ended.is_set():
            now = clock()
            if not self.lease.look(now):
                self._end(f"no answer of the supervisor for {self.lease.seconds:g} s")
            if now >= due:
                due = now + PING_SECONDS
                self.tell({"ping": self.lease.ask(now), "steps": self._steps()})
            try:
                self._exchange(max(0.0, min(due, max(self.lease.until, now)) - now))
            except OSError as error:
                self._end(f"the connection to the supervisor has ended ({error})")

    def _exchange(self, seconds: float) -> None:
        """Send and receive what there is, after waiting for at most so long. Raises OSError."""
        ready = select.poll()  # `select` itself takes no numbers from 1,024 on
        ready.register(self._link, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        ready.register(self._woken, select.POLLIN)
        ready.poll(1000 * seconds + 1)
        with suppress(BlockingIOError):
            self._woken.recv(LINE_BYTES)
        with self._lock:
            if self._outgoing:
                with suppress(BlockingIOError):
                    self._outgoing = self._outgoing[self._link.send(self._outgoing) :]
        with suppress(BlockingIOError):
            part = self._link.recv(LINE_BYTES)
            if not part:
                raise OSError("closed")
            self._incoming += part
            self._hear()

    def _hear(self) -> None:
        *lines, self._incoming = self._incoming.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise OSError("it speaks another language") from None
            if not isinstance(message, dict):
                raise OSError("it speaks another language")
            if "end" in message:
                self._end("")
            elif isinstance(message.get("answer"), int):
                self.lease.answer(message["answer"])
            elif "noted" in message:
                self.ended.set()

    def wait_for_lease(self) -> None:
        """Return when the lease holds; the thread ends this process if it does not come to that."""
        while clock() >= self.lease.until and not self.ended.is_set():
            time.sleep(0.01)

    def end_well(self, status: int) -> None:
        """Tell that this rank has come to its end, and wait until that is known."""
        self.tell({"ended": status})
        self.ended.wait(2 * self.lease.seconds)

    def let_go(self) -> None:
        """Close the connection; for a forked child, which must not hold it open."""
        for link in (self._link, self._wake, self._woken):
            link.close()

    def _end(self, reason: str) -> None:
        """End this process, now: whatever it is doing is not to last. Why, on standard error."""
        if reason:
            host = socket.gethostname()
            told = f"mpidl: process {self.process} on {host} ends itself: {reason}\n"
            _write(told.encode(errors="replace"))
        abort.unlink_segments()
        os._exit(STATUS)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _write(text: bytes) -> None:
    """Write to standard error, unless nobody takes it: that must not keep this process alive."""
    with suppress(OSError, ValueError):
        ready = select.poll()
        ready.register(2, select.POLLOUT)
        if ready.poll(0):
            os.write(2, text)
