"""Carries packets between hosts and the switch, and keeps each for a while: see hosts.sh.

`delay.py DELAY PID...`, in the switch's network: makes eth0 in the network of each process, joined
to p0, p1, ... in this one. Prints "ready", and never ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import re
import select
import struct
import subprocess
import sys
import time
from typing import NoReturn

TUNSETIFF = 0x400454CA  # of linux/if_tun.h
TAP_WITHOUT_HEADER = 0x0002 | 0x1000  # IFF_TAP | IFF_NO_PI
MTU = 65000  # one TCP segment of the largest size is one packet here: less to carry
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse(delay: str) -> float:
    """Return seconds. Raises ValueError."""
    found = re.fullmatch(r"([\d.]+)(us|ms|s)", delay)
    if not found:
        raise ValueError(f"delay {delay}: expected a number and us, ms or s")
    return float(found[1]) * SECONDS[found[2]]


def tap(libc: ctypes.CDLL, network: int, name: str) -> int:
    """Make an interface in a network namespace, and return the descriptor of its far end."""
    if libc.setns(network, 0):  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    subprocess.run(["ip", "link", "set", name, "mtu", str(MTU), "txqueuelen", "1000"], check=True)
    return file


def join(processes: list[str]) -> dict[int, tuple[int, bool]]:
    """Make all interfaces; return for each end the other one, and whether it is a host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    switch, *hosts = (os.open(f"/proc/{p}/ns/net", os.O_RDONLY) for p in ["self", *processes])
    ends = {}
    for i, network in enumerate(hosts):
        host, port = tap(libc, network, "eth0"), tap(libc, switch, f"p{i}")
        ends[host], ends[port] = (port, True), (host, False)
    return ends


def carry(ends: dict[int, tuple[int, bool]], delay: float) -> NoReturn:
    """Delay what leaves a host by so many seconds."""
    waiting: list[tuple[float, int, int, bytes]] = []  # when due, a number, where to, the packet
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for file in select.select(list(ends), [], [], pause)[0]:
            try:
                packet = os.read(file, MTU + 100)
            except OSError:
                continue
            other, leaves_a_host = ends[file]
            number += 1
            due = time.monotonic() + (delay if leaves_a_host else 0.0)
            heapq.heappush(waiting, (due, number, other, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, file, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the link is down, or its queue full: it is lost
                os.write(file, packet)


if __name__ == "__main__":
    made, seconds = join(sys.argv[2:]), parse(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    carry(made, seconds)
