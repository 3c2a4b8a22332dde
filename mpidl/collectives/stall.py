"""Tells who is waited for, where it takes long."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, final

from mpidl.marks import some

if TYPE_CHECKING:
    from mpidl.collectives.coordinator import Coordinator
    from mpidl.collectives.request import Key

LOOKS = 4  # in the time after which it is told


@final
class Stall:
    """Looks now and then at what has begun, and tells once of each operation that waits.

    What is seen at two looks may be two operations of one name: then it is taken for one that
    waits, if the same ranks have submitted it both times.
    """

    def __init__(self, coordinator: Coordinator, seconds: float) -> None:
        self.coordinator, self.seconds = coordinator, seconds
        self.interval = seconds / LOOKS if seconds else math.inf
        self._next = time.monotonic() + self.interval
        self._since: dict[tuple[Key, ...], tuple[float, list[int]]] = {}
        self._told: set[tuple[Key, ...]] = set()

    def look(self) -> None:
        """Look, if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.interval
        before, self._since = self._since, {}
        lines = []
        for keys, kind, here, missing in self.coordinator.waiting():
            since, _ = self._since[keys] = before.get(keys, (now, here))
            if now - since >= self.seconds and keys not in self._told:
                self._told.add(keys)
                (process_set, name), more = keys[0], len(keys) - 1
                lines.append(
                    f"mpidl: {kind} {name!r}"
                    + f" and {more} more of its group" * bool(more)
                    + f" in process set {process_set}" * bool(process_set)
                    + f" waits for {some(missing)} since {now - since:.0f} s; "
                    f"submitted by {some(here)}\n"
                )
        self._told &= self._since.keys()
        if lines:
            sys.stderr.write("".join(lines))
            sys.stderr.flush()
