"""The clocks of hosts, compared over MPI: a trace shows all ranks by one of them."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

PINGS = 20
NAP_SECONDS = 1e-4
TAG = 32765
BOOT, TIME_SPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/time")

#: When, by this host's clock; how far that is ahead of the other then; the uncertainty. Seconds.
Sample = tuple[float, float, float]


def offset(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return how far another clock is ahead, and the uncertainty, from (asked, its time, answered).

    Cristian (1989, doi:10.1007/BF01784024): the shortest round trip tells the most, and the answer
    came somewhere in it.
    """
    asked, told, answered = min(samples, key=lambda sample: sample[2] - sample[0])
    return told - (asked + answered) / 2, (answered - asked) / 2


def machine() -> str:
    """Return what processes have in common whose `time.perf_counter` is the same clock.

    On Linux that counts from the boot on (CLOCK_MONOTONIC), in one time namespace.
    """
    boot = space = ""
    with suppress(OSError):
        boot = BOOT.read_text().strip()
        space = str(TIME_SPACE.readlink())
    return f"{platform.node()} {boot} {space}"


def measure(
    MPI: Any, comm: Any, key: str, clock: Callable[[], float] = time.perf_counter
) -> Sample | None:
    """Compare this machine's clock with rank 0's; None where they are one. Collective.

    `key` is what `machine` returns. One rank of each machine asks for all of its own.
    """
    keys = comm.allgather(key)
    leaders = {found: rank for rank, found in reversed(list(enumerate(keys))) if found != keys[0]}
    if not leaders:
        return None
    samples: dict[str, Sample] = {}
    told = np.zeros(1)
    if comm.rank == 0:
        for found, rank in leaders.items():
            trips = []
            for _ in range(PINGS):
                asked = clock()
                comm.Send(told, rank, TAG)
                comm.Recv(told, rank, TAG)
                trips.append((asked, float(told[0]), clock()))
            samples[found] = (trips[-1][1], *offset(trips))
    elif leaders.get(key) == comm.rank:
        for _ in range(PINGS):
            wait(MPI, comm.Irecv(told, 0, TAG))
            told[0] = clock()
            comm.Send(told, 0, TAG)
    wait(MPI, comm.Ibarrier())  # others nap until rank 0 has asked all
    samples = comm.bcast(samples, 0)
    return samples.get(key)


def wait(MPI: Any, request: Any) -> None:
    """Complete a request; quickly at first, then with naps: it may take long."""
    begin = time.perf_counter()
    while not MPI.Request.Testall([request]):
        if time.perf_counter() - begin > 1e-3:
            time.sleep(NAP_SECONDS)


def ahead(samples: Sequence[Sample], times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how far a clock is ahead of rank 0's at `times` of its own: linear between samples.

    Where a run was cut off there is the first one alone, and drift shows: some 10 us a second.
    """
    if not samples:
        return np.zeros_like(times)
    at, by, _ = zip(*sorted(samples), strict=True)
    return np.interp(times, at, by)
