"""A timer that one thread sleeps on, and that others set and stop without waking it; short naps."""

from __future__ import annotations

import ctypes
import os
import time
from typing import ClassVar, final

from mpidl.world import NAP_SECONDS, SPIN_SECONDS

CLOCK_MONOTONIC, TFD_CLOEXEC = 1, 0o2000000  # of Linux's time.h, sys/timerfd.h


class _Setting(ctypes.Structure):
    """struct itimerspec: the interval, and the time to the first end, each in two parts."""

    _fields_: ClassVar = [(name, ctypes.c_long) for name in ("_s", "_ns", "seconds", "nanoseconds")]


@final
class Timer:
    """Linux's timerfd: `sleep` returns when the time that was set last has passed.

    A thread that wakes asks for Python's interpreter lock, and gets it as soon as another one calls
    MPI: measured, that costs the other one a millisecond where all cores are busy. So a thread that
    is not wanted must not wake; a sleep of Python's own cannot be called off.
    """

    def __init__(self) -> None:
        library = ctypes.PyDLL(None, use_errno=True)
        self._set = library.timerfd_settime
        self._set.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._file = library.timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._stopped = ctypes.byref(_Setting())
        self._settings: dict[float, object] = {}

    def set(self, seconds: float) -> None:
        """Let `sleep` return after so many seconds from now, whatever was set before."""
        setting = self._settings.get(seconds)
        if setting is None:
            whole = int(seconds)
            part = max(1, int((seconds - whole) * 1e9))
            setting = self._settings[seconds] = ctypes.byref(_Setting(0, 0, whole, part))
        self._set(self._file, 0, setting, None)

    def stop(self) -> None:
        """Let `sleep` go on for ever, until a time is set."""
        self._set(self._file, 0, self._stopped, None)

    def sleep(self) -> None:
        """Wait for the end of the time."""
        os.read(self._file, 8)

    def close(self) -> None:
        """Give the file back, when nobody sleeps."""
        os.close(self._file)


def pause(start: float) -> None:
    """Leave the core to others: for a moment, or for a nap if nothing has come since `start`.

    `time.sleep(0)` takes 76 us where the kernel rounds it up to its timers' slack.
    """
    if time.perf_counter() - start > SPIN_SECONDS:
        time.sleep(NAP_SECONDS)
    else:
        os.sched_yield()
