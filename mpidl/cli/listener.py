"""Where the ranks of a supervised run report: see mpidl/supervised.py for the other side.

What comes from the network is a line of JSON with the token of this run, or the connection is
closed. Nothing of it is executed, and it takes no more memory than a few lines for each connection.
"""

from __future__ import annotations

import errno
import hmac
import json
import selectors
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from mpidl import config
from mpidl.lease import LINE_BYTES, PING_SECONDS, clock

if TYPE_CHECKING:
    from collections.abc import Callable

HELLO_SECONDS = 5.0  # to say the token
LEAVING_BYTES = 1 << 16  # that may wait for a rank that takes nothing
# tcpi_unacked in struct tcp_info of linux/tcp.h: packets that were not acknowledged yet
UNACKNOWLEDGED = struct.Struct("=24xI")
STATUSES = (0, config.EXIT_NOT_SAVED, config.EXIT_REQUEUE)  # of a run that ends well


@dataclass(eq=False)
class Member:
    """A rank, by what it has told. Times are in seconds, of `lease.clock`."""

    rank: int  #: at the start
    host: str  #: as it calls itself
    process: int
    address: str
    answered: float  #: when it last got an answer: its lease ends so much later
    heard: float  #: when its host last gave a sign of life
    size: int | None = None  #: of the world
    steps: int = 0
    status: int | None = None  #: with which it ended well
    closed: str = ""  #: how its connection ended: "closed" by the end of its process, or "broken"
    closed_at: float = 0.0

    @property
    def lives(self) -> bool:
        """Whether it is at work, as far as is known."""
        return not self.closed and self.status is None

    def hear(self, message: dict[str, Any], now: float) -> dict[str, Any] | None:
        """Take in a message, and return what to answer. Raises ValueError for what is none."""
        self.heard = now
        if "steps" in message:
            self.steps = _number(message["steps"])
            if "ping" not in message:
                return None
        if "ping" in message:
            self.answered = now
            return {"answer": _number(message["ping"])}
        if "size" in message:
            self.size = _number(message["size"])
            return None
        if message.get("ended") not in STATUSES:
            raise ValueError("unknown message")
        self.status = _number(message["ended"])
        return {"noted": 1}


@dataclass(eq=False)
class _Connection:
    link: socket.socket
    address: str
    since: float
    member: Member | None = None
    incoming: bytes = b""
    outgoing: bytes = b""


@final
class Listener:
    """Takes connections, and answers ranks of the attempt that is going on.

    Args:
        token: what ranks must say first.
        everywhere: whether ranks are on other hosts, too.
        most: connections at once.
    """

    def __init__(
        self,
        token: str,
        *,
        everywhere: bool,
        most: int,
        clock: Callable[[], float] = clock,
    ) -> None:
        self.members: list[Member] = []  #: of this attempt
        self.attempt, self.over = -1, True
        self._token, self._most, self._clock = token.encode(), most, clock
        self._selector = selectors.DefaultSelector()
        self._socket = _listen(everywhere=everywhere)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._connections: list[_Connection] = []

    def begin(self, attempt: int) -> None:
        """Take ranks of another attempt from now on. The last one must be over."""
        assert self.over
        for connection in list(self._connections):
            self._close(connection, "closed")
        self.members, self.attempt, self.over = [], attempt, False

    def end(self) -> None:
        """Let all ranks end, those of which nobody knows yet too. No lease is given any more."""
        self.over = True
        for connection in self._connections:
            if connection.member is not None:
                self._send(connection, {"end": 1})

    def wake_by(self, link: socket.socket) -> None:
        """Let `look` return where something comes by this socket, which is emptied."""
        link.setblocking(False)
        self._selector.register(link, selectors.EVENT_READ, "wake")

    def look(self, seconds: float) -> None:
        """Wait for messages, for at most so long, and answer them."""
        for key, events in self._selector.select(max(0.0, seconds)):
            if key.data is None:
                self._accept()
            elif key.data == "wake":
                with suppress(BlockingIOError):
                    key.fileobj.recv(LINE_BYTES)  # type: ignore[union-attr]
            else:
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    self._receive(key.data)

    def tick(self) -> None:
        """Look for signs of life of each host. To be called every PING_SECONDS or so.

        A host acknowledges what it gets, whatever its processes do: so one whose Python code holds
        the interpreter for long is told from one that is gone. Silent is who was sent something,
        and has not acknowledged it: so it is no silence where this process itself did not run.
        """
        now = self._clock()
        for connection in list(self._connections):
            member = connection.member
            if member is None:
                if now - connection.since > HELLO_SECONDS:
                    self._close(connection, "broken")
                continue
            if now - member.heard >= PING_SECONDS:
                if _acknowledged(connection.link):
                    member.heard = now
                self._send(connection, {"there": 1})

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._connections):
            self._close(connection, "closed")
        self._selector.close()
        self._socket.close()

    def _accept(self) -> None:
        try:
            link, address = self._socket.accept()
        except OSError:
            return
        if len(self._connections) >= self._most:
            strangers = [c for c in self._connections if c.member is None]
            if not strangers:
                link.close()
                return
            self._close(strangers[0], "broken")  # the oldest
        link.setblocking(False)
        connection = _Connection(link, address[0].removeprefix("::ffff:"), self._clock())
        self._connections.append(connection)
        self._selector.register(link, selectors.EVENT_READ, connection)

    def _receive(self, connection: _Connection) -> None:
        try:
            part = connection.link.recv(LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection, "broken")
            return
        if not part:
            self._close(connection, "closed")
            return
        connection.incoming += part
        *lines, connection.incoming = connection.incoming.split(b"\n")
        try:
            for line in lines:
                self._hear(connection, line)
            if len(connection.incoming) > LINE_BYTES:
                raise ValueError("no line")
        except (ValueError, RecursionError):
            self._close(connection, "broken")

    def _hear(self, connection: _Connection, line: bytes) -> None:
        """Answer a line. Raises ValueError for what no rank says."""
        if len(line) > LINE_BYTES:
            raise ValueError("too long")
        message, now = json.loads(line), self._clock()
        if not isinstance(message, dict):
            raise ValueError("no message")
        if connection.member is None:
            self._welcome(connection, message, now)
        elif not self.over:
            answer = connection.member.hear(message, now)
            if answer is not None:
                self._send(connection, answer)

    def _welcome(self, connection: _Connection, message: dict[str, Any], now: float) -> None:
        token = message.get("token")
        if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self._token):
            raise ValueError("a stranger")
        attempt, host = _number(message.get("attempt")), message.get("host")
        if not isinstance(host, str) or not host.isprintable():
            raise ValueError("no host")
        if self.over or attempt != self.attempt:
            self._send(connection, {"end": 1})
            return
        rank, process = _number(message.get("rank")), _number(message.get("process"))
        connection.member = Member(rank, host, process, connection.address, now, now)
        self.members.append(connection.member)
        self._send(connection, {"welcome": 1})

    def _send(self, connection: _Connection, message: dict[str, Any]) -> None:
        if len(connection.outgoing) < LEAVING_BYTES:
            connection.outgoing += json.dumps(message).encode() + b"\n"
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        with suppress(OSError):  # where it is broken, receiving tells
            sent = connection.link.send(connection.outgoing)
            connection.outgoing = connection.outgoing[sent:]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        with suppress(KeyError):  # it is being closed
            self._selector.modify(connection.link, events, connection)

    def _close(self, connection: _Connection, how: str) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection.link)
        connection.link.close()
        if connection.member is not None:
            connection.member.closed, connection.member.closed_at = how, self._clock()


def _acknowledged(link: socket.socket) -> bool:
    with suppress(OSError, struct.error):
        told = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, UNACKNOWLEDGED.size)
        return not UNACKNOWLEDGED.unpack(told)[0]
    return False


def _listen(*, everywhere: bool) -> socket.socket:
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
    return socket.create_server(("0.0.0.0", 0), backlog=1024)


def _number(value: Any) -> int:
    """Return a number from the network. Raises ValueError for another one than expected."""
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError("no number")
    return value
