"""Signals to a process that waits for sockets."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@final
class Signals:
    """Signals to the supervisor, noted for `take`."""

    def __init__(self) -> None:
        self.asked: int | None = None  #: the first by which the run was asked to stop
        self.again = False  #: whether that one came more than once
        self._new: list[signal.Signals] = []
        self.woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._before: dict[int, Any] = {}
        handlers: dict[signal.Signals, Callable[[int, Any], None]] = {
            **dict.fromkeys(SIGNALS, self._note),
            signal.SIGCHLD: lambda *_: None,  # it wakes
            signal.SIGTSTP: lambda *_: None,  # ranks would lose their leases
        }
        self._wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number, handler in handlers.items():
            self._before[number] = signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self._new.append(signal.Signals(number))
        if number != signal.SIGUSR2:
            self.again = self.again or number == self.asked
            self.asked = self.asked or number

    def take(self) -> list[signal.Signals]:
        """Return those that came since the last call."""
        new, self._new = self._new, []
        return new

    def close(self) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._wake.close()
        self.woken.close()
