"""The one place where a rank reads environment variables; cli/launcher.py sets them."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Exit statuses of a run, the same on all ranks; as in BSD's sysexits.h.
EXIT_NOT_SAVED = 74  # EX_IOERR: trained to its end, but its last checkpoint could not be written
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal, with a checkpoint: start it again


def cuda_aware() -> str:
    """MPIDL_CUDA_AWARE: "yes" or "no" overrules what the MPI library says; "auto" asks it."""
    return _choice("MPIDL_CUDA_AWARE", "auto", ("auto", "yes", "no"))


def terminal_width() -> int | None:
    """MPIDL_TERMINAL: columns of the terminal behind the launcher's pipe; None if there is none.

    `mpidl run` sets it, since a rank sees only the launcher's pipe.
    """
    value = os.environ.get("MPIDL_TERMINAL", "")
    return int(value) if value.isdigit() else None


def stall_seconds() -> float:
    """MPIDL_STALL_SECONDS: how long a call may wait for other ranks untold; 0: for ever."""
    value = os.environ.get("MPIDL_STALL_SECONDS", "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InvalidArgument(f"MPIDL_STALL_SECONDS={value!r}: expected seconds, 0 or more")
    return seconds


def faults() -> str | None:
    """MPIDL_FAULTS: what `mpidl.testing` is to let go wrong, as JSON; None for nothing."""
    return os.environ.get("MPIDL_FAULTS") or None


def out() -> str | None:
    """MPIDL_OUT: the folder of this job, where a `Trainer` writes by default; None of no job."""
    return os.environ.get("MPIDL_OUT") or None


def run() -> str | None:
    """MPIDL_RUN: the name of a run that `mpidl run --restarts` watches; None if none does."""
    value = os.environ.get("MPIDL_RUN", "")
    return value if value.isalnum() and value.isascii() else None


def attempt() -> int:
    """MPIDL_ATTEMPT: how often that run was started before."""
    value = os.environ.get("MPIDL_ATTEMPT", "")
    return int(value) if value.isdecimal() and value.isascii() and run() is not None else 0


def stall(asked: str | None = None) -> str:
    """MPIDL_STALL, or what was `asked`: whether to end a job that has come to a halt."""
    return _choice("MPIDL_STALL", "abort", ("abort", "warn"), asked)


def check(asked: str | None = None) -> str:
    """MPIDL_CHECK, or what was `asked`: what to compare between ranks, for debugging."""
    return _choice("MPIDL_CHECK", "nothing", ("nothing", "collectives"), asked)


def launched_size() -> tuple[str, int] | None:
    """Return the variable with which a launcher tells the number of ranks, and that number.

    mpirun's own variables come first: inside a SLURM job both kinds are there. A job step's
    count is used and not the job's, which is set in batch scripts too.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return name, int(value)
    return None


def fault_tolerant() -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's launcher tells, given --with-ft."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112  # its spelling


def launched() -> bool:
    """Whether any launcher started this process: all speak PMIx or PMI with their ranks."""
    return any(name.startswith(("PMIX_", "PMI_", "PMI2_", "OMPI_COMM_")) for name in os.environ)


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Set an environment variable in this context, for this process, where it is not set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _choice(name: str, default: str, valid: tuple[str, ...], asked: str | None = None) -> str:
    value = os.environ.get(name, default) if asked is None else asked
    if value not in valid:
        raise InvalidArgument(f"{name}={value!r}: expected one of {', '.join(valid)}")
    return value
