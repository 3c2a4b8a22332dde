"""Communicators that are made while ranks may die."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from mpidl import config

if TYPE_CHECKING:
    from collections.abc import Callable

_known: list[weakref.ref[Any]] = []


def noted(comm: Any) -> Any:
    """Let `mpidl.world.revoke` know of a communicator that all have `made`, while it is there."""
    _known[:] = [ref for ref in _known if ref() is not None]
    _known.append(weakref.ref(comm))
    return comm


def known() -> list[Any]:
    """Return the communicators, of all worlds, that were `noted`."""
    return [comm for comm in (ref() for ref in _known) if comm is not None]


def made(MPI: Any, parent: Any, make: Callable[[], Any]) -> Any:
    """Return the communicator that `make` makes of `parent`, once all ranks have it. Collective.

    Open MPI 5.0.11 crashes where a communicator is revoked that another rank still makes: the
    message comes before its table of collectives (`ompi_comm_revoke_local`). A rank that has it
    may learn of a death at once, and revoke all that it knows. So ranks agree before they know it:
    MPI_Comm_agree comes to an end whoever dies, and so does `make`, as `parent` is revoked where it
    fails. Then all raise an error of MPI, and what some have made nobody uses, or revokes.
    """
    if not config.fault_tolerant():
        return make()
    try:
        comm = make()
    except Exception:
        parent.Revoke()
        parent.Agree(0)
        raise
    if not parent.Agree(1):
        raise MPI.Exception(MPI.ERR_REVOKED)
    return comm
