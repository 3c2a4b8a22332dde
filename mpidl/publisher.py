"""A thread that publishes updated parameters while the next forward pass begins."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from mpidl.trace.ranges import spanned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.array import Array
    from mpidl.strategies import Strategy


class Publisher(threading.Thread):
    """Shares `params`, which their owners have updated, one after the other. Collective.

    No other thread may use the strategy until this ends: see `end`. As a `Reducer`, it makes the
    messages' progress itself. Python ends only after it: peers may still wait for what it sends.
    """

    def __init__(self, strategy: Strategy, params: Sequence[Array]) -> None:
        super().__init__(name="mpidl publisher")
        self._strategy, self._params = strategy, params
        self._shared = [threading.Event() for _ in params]
        self._error: BaseException | None = None

    def wait(self, number: int) -> None:
        """Wait until this array is published, and raise what went wrong. Not collective."""
        self._shared[number].wait()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait until all are published, and raise what went wrong. Not collective."""
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Do it all; in the thread."""
        try:
            start = time.perf_counter()
            for number in self._strategy.publish(self._params):
                self._shared[number].set()
                spanned(f"parameters of bucket {number}", start, self._params[number].nbytes)
                start = time.perf_counter()
        except BaseException as error:  # told to whoever waits
            self._error = error
        for event in self._shared:
            event.set()
