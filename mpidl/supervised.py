"""The ranks' side of `mpidl run --restarts`: a lease, without which a rank ends itself.

The supervisor (mpidl/cli/supervise.py) starts a run again when an attempt at it has failed. No two
attempts may train or write at once, also where a part of the hosts is cut off and goes on. So each
rank holds a lease, as in Gray and Cheriton (1989, doi:10.1145/74850.74870): a thread asks the
supervisor every half a second, and each answer lets the rank go on until MPIDL_LEASE_SECONDS after
it was asked for. Whoever has none ends itself, at once; and the supervisor begins the next attempt
when the last answer that it gave is older than that. The thread is in mpidl/lease.py.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from mpidl import abort, config

if TYPE_CHECKING:
    from mpidl.lease import Keeper

_keeper: Keeper | None = None
_found: config.Supervisor | None = None
_steps = 0


def known() -> config.Supervisor | None:
    """Return the supervisor of this run, for a rank that joins it; None if it has none."""
    return _found


def start(found: config.Supervisor | None = None) -> None:
    """Find the supervisor of this run, if it has one. Not collective, and before MPI starts.

    So a rank that waits in MPI_Init for a host that has died is seen, too. One that was spawned
    later is told of it by the others, in `found`. Raises MpidlError where the supervisor cannot be
    reached. A rank of an attempt that is over ends.
    """
    global _keeper, _found
    asked = config.supervisor()
    _found = found or (asked if config.spawned() is None else None)
    if _found is None or _keeper is not None:
        return
    from mpidl.lease import Keeper  # its imports are slow, and few runs need them

    _keeper = Keeper(_found, config.lease_seconds(), lambda: _steps)
    _keeper.start()
    os.register_at_fork(after_in_child=_forget)


def tell_size(size: int) -> None:
    """Tell the supervisor how many ranks the world has, now."""
    if _keeper is not None:
        if "mpi4py.MPI" in sys.modules:
            abort.watch(sys.modules["mpi4py.MPI"])  # `raise SystemExit(n)` is no good end
        _keeper.tell({"size": size})


def note_step(number: int | None = None) -> None:
    """Count a step of training, or say how many there were, those before a restart too."""
    global _steps
    first, _steps = not _steps, _steps + 1 if number is None else number
    if first and _keeper is not None:  # who fails soon is known to have made one
        _keeper.tell({"steps": _steps})


def check_lease() -> None:
    """Return if this rank may write what lasts; otherwise this rank ends. Not collective.

    To be called immediately before a file gets its name. A process that was stopped goes on with
    whatever it was about to do, before its thread finds out how late it is: so this one waits for
    a new answer where the last one is too old.
    """
    if _keeper is not None:
        _keeper.wait_for_lease()


def _forget() -> None:
    """In a forked child: it is no rank, and must not hold the rank's connection open."""
    global _keeper
    if _keeper is not None:
        _keeper.let_go()
        _keeper = None


def _end() -> None:
    if _keeper is None or os.getpid() != _keeper.process:
        return
    status = abort.final_status()
    if status is not None:
        _keeper.end_well(status)


# At this module's import, so after `watchdog`'s, which waits for all ranks to come to their end,
# and before `abort`'s, which may end this process.
atexit.register(_end)
