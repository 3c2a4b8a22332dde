"""The one place where a rank reads environment variables; cli/launcher.py sets them."""

from __future__ import annotations

import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl import launched
from mpidl.errors import InvalidArgument
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Exit statuses of a run, the same on all ranks; as in BSD's sysexits.h.
EXIT_NOT_SAVED = 74  # EX_IOERR: trained to its end, but its last checkpoint could not be written
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal, with a checkpoint: start it again
TRANSPORTS = ("CUDA_VISIBLE_DEVICES", "FI_", "I_MPI_OFFLOAD", "MPICH_GPU_SUPPORT_ENABLED",
              "MV2_USE_CUDA", "OMPI_MCA_accelerator", "OMPI_MCA_btl", "OMPI_MCA_coll",
              "OMPI_MCA_opal_cuda", "OMPI_MCA_osc", "OMPI_MCA_pml", "PSM2_CUDA",
              "UCX_")  # fmt: skip
LEAST_LEASE = 1.0  # seconds: a lease is asked for twice a second


def cuda_aware() -> str:
    """MPIDL_CUDA_AWARE: "yes" or "no" overrules what the MPI library says; "auto" measures."""
    return _choice("MPIDL_CUDA_AWARE", "auto", ("auto", "yes", "no"))


def quiet() -> bool:
    """MPIDL_QUIET: 1 where a `Trainer` is to show nothing, unless it is told otherwise."""
    return _choice("MPIDL_QUIET", "0", ("0", "1")) == "1"


def transports() -> dict[str, str]:
    """Return the variables that decide what MPI does with GPU memory, and CUDA_VISIBLE_DEVICES."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(TRANSPORTS)}


def cache_folder() -> Path | None:
    """XDG_CACHE_HOME, or ~/.cache: where this user's "mpidl" is; None where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(home).is_absolute():  # as the specification of these folders wants it
        home = os.path.expanduser("~/.cache")  # noqa: PTH111  # raises nothing
    return Path(home) / "mpidl" if Path(home).is_absolute() else None


def terminal_width() -> int | None:
    """MPIDL_TERMINAL: columns of the terminal behind the launcher's pipe; None if there is none.

    `mpidl run` sets it, since a rank sees only the launcher's pipe.
    """
    value = os.environ.get("MPIDL_TERMINAL", "")
    return int(value) if value.isdecimal() else None


def stall_seconds() -> float:
    """MPIDL_STALL_SECONDS: how long a call may wait for other ranks untold; 0: for ever."""
    return _seconds("MPIDL_STALL_SECONDS", "60", 0.0)


def lease_seconds() -> float:
    """MPIDL_LEASE_SECONDS: how long a rank goes on without an answer of its supervisor."""
    return _seconds("MPIDL_LEASE_SECONDS", "5", LEAST_LEASE)


def silent_seconds() -> float:
    """MPIDL_SILENT_SECONDS: how long a host may be silent, until the supervisor gives it up."""
    return _seconds("MPIDL_SILENT_SECONDS", "6", 2 * LEAST_LEASE)


@dataclass(frozen=True)
class Supervisor:
    """Where the supervisor of this run listens, and which attempt this is."""

    port: int
    token: str = field(repr=False)
    addresses: tuple[str, ...]
    attempt: int


def supervisor() -> Supervisor | None:
    """MPIDL_SUPERVISOR (PORT,TOKEN,ADDRESS...) and MPIDL_ATTEMPT: those of `mpidl run --restarts`.

    The first is taken out of the environment: what a rank starts is no rank of the run.
    """
    value = os.environ.pop("MPIDL_SUPERVISOR", "")
    if not value:
        return None
    port, *rest = value.split(",")
    attempt = os.environ.get("MPIDL_ATTEMPT", "")
    numbers = all(re.fullmatch(r"\d{1,9}", text, re.ASCII) for text in (port, attempt))
    if not numbers or int(port) > 65535 or len(rest) < 2 or not all(rest):
        raise InvalidArgument(
            f"MPIDL_SUPERVISOR, MPIDL_ATTEMPT={attempt!r}: expected those of mpidl run --restarts"
        )
    return Supervisor(int(port), rest[0], tuple(rest[1:]), int(attempt))


def run_id() -> str | None:
    """MPIDL_RUN: the name of a run, the same in all attempts at it; None without a supervisor."""
    value = os.environ.get("MPIDL_RUN", "")
    if value and not re.fullmatch(r"[0-9a-f]{8,64}", value):
        raise InvalidArgument(f"MPIDL_RUN={value!r}: expected what mpidl run --restarts has set")
    return value or None


def faults() -> str | None:
    """MPIDL_FAULTS: what `mpidl.testing` is to let go wrong, as JSON; None for nothing."""
    return os.environ.get("MPIDL_FAULTS") or None


def job_folder() -> str | None:
    """MPIDL_OUT: the folder of this job, by its script; None of no job."""
    return os.environ.get("MPIDL_OUT") or None


def out() -> str | None:
    """Return where a `Trainer` writes by default: MPIDL_OUT, or a folder of its own in it.

    That is for processes of one job that each train alone: its name is the launcher's number.
    """
    folder = job_folder()
    return f"{folder}/{launched.rank()}" if folder and alone() else folder


def trace() -> Path | None:
    """MPIDL_TRACE: the file that gets a trace of all ranks (`mpidl run --trace`).

    What a rank starts is no rank of the run, but for those that are to take others' places.
    """
    value = os.environ.get("MPIDL_TRACE")
    known = "MPIDL_TRACED" in os.environ and spawned() is None
    if not value or known:
        return None
    path = Path(value).absolute()
    return path.parent / str(launched.rank()) / path.name if alone() else path


def trace_run() -> str | None:
    """MPIDL_TRACE_RUN: a name that all processes of a run have, also those spawned later."""
    value = os.environ.get("MPIDL_TRACE_RUN", "")
    return value if re.fullmatch(r"[0-9a-f]{8,64}", value) else None


def note_trace(run: str) -> None:
    """Let processes that this one starts know that their trace is this one's."""
    os.environ.update({"MPIDL_TRACED": "1", "MPIDL_TRACE_RUN": run})


def trace_events() -> int | None:
    """MPIDL_TRACE_EVENTS: how many events a rank records, at most; 40 bytes each."""
    return _count("MPIDL_TRACE_EVENTS")


def attempt() -> int:
    """MPIDL_ATTEMPT: how often that run was started before."""
    value = os.environ.get("MPIDL_ATTEMPT", "")
    return int(value) if value.isdecimal() and value.isascii() and run_id() is not None else 0


def stall(asked: str | None = None) -> str:
    """MPIDL_STALL, or what was `asked`: whether to end a job that has come to a halt."""
    return _choice("MPIDL_STALL", "abort", ("abort", "warn"), asked)


def check(asked: str | None = None) -> str:
    """MPIDL_CHECK, or what was `asked`: what to compare between ranks, for debugging."""
    return _choice("MPIDL_CHECK", "nothing", ("nothing", "collectives"), asked)


def alone() -> bool:
    """MPIDL_ALONE: 1 where each process that a launcher starts is to train for itself."""
    return _choice("MPIDL_ALONE", "0", ("0", "1")) == "1"


def fault_tolerant() -> bool:
    """Whether this MPI goes on when a rank dies: Open MPI's launcher tells, given --with-ft."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112  # its spelling


def replace() -> bool:
    """MPIDL_REPLACE: whether new ranks are spawned for those that die (`mpidl run --replace`)."""
    return fault_tolerant() and os.environ.get("MPIDL_REPLACE") == "1"


def spawned() -> str | None:
    """MPIDL_SPAWNED: "PID HOST" of the rank that has spawned this one in another's place."""
    return os.environ.get("MPIDL_SPAWNED") if replace() else None


def status_file() -> Path | None:
    """MPIDL_STATUS_FILE: where `mpidl run` looks for the status of ranks that end the run."""
    path = os.environ.get("MPIDL_STATUS_FILE")
    return Path(path) if path else None


def min_ranks() -> int:
    """MPIDL_MIN_RANKS: with how many ranks, at least, training goes on when others have died."""
    value = os.environ.get("MPIDL_MIN_RANKS", "1")
    if not value.isdigit() or int(value) < 1:
        raise InvalidArgument(f"MPIDL_MIN_RANKS={value!r}: expected a whole number from 1 on")
    return int(value)


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


def bind(asked: str | None = None) -> str:
    """MPIDL_BIND, or what was `asked`: "cores" binds ranks, where the launcher has not."""
    return _choice("MPIDL_BIND", "none", ("none", "cores"), asked)


def oversubscribe() -> bool:
    """MPIDL_OVERSUBSCRIBE: 1 where ranks are meant to share cores and GPUs: nothing is told."""
    return _choice("MPIDL_OVERSUBSCRIBE", "0", ("0", "1")) == "1"


def threads() -> int | None:
    """How many threads a rank has, as the user has set it; None where that is left to libraries."""
    by_user = ("OMP_NUM_THREADS",) if pbs_threads() is None else ()
    names = (*by_user, "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return max((n for n in map(_count, names) if n is not None), default=None)


def pbs_threads() -> int | None:
    """Return OMP_NUM_THREADS where PBS may have set it; None where the user has.

    PBS sets it and NCPUS, to `ompthreads`, or else to all of a host's cores, for each of its ranks.
    """
    count = _count("OMP_NUM_THREADS")
    return count if "PBS_JOBID" in os.environ and count == _count("NCPUS") else None


def allocated_cores() -> int | None:
    """Return the most cores of each rank, as SLURM or PBS tells them; others bind theirs."""
    return _count("SLURM_CPUS_PER_TASK") or pbs_threads()


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES: which GPUs this rank may see; None for all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _count(name: str) -> int | None:
    value = os.environ.get(name, "").split(",")[0].strip()  # OpenMP has one for each level
    return int(value) if re.fullmatch(r"[1-9]\d{0,8}", value, re.ASCII) else None


def _seconds(name: str, default: str, least: float) -> float:
    value = os.environ.get(name, default)
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not least <= seconds < math.inf:
        raise InvalidArgument(f"{name}={value!r}: expected seconds, {least:g} or more")
    return seconds


def _choice(name: str, default: str, valid: tuple[str, ...], asked: str | None = None) -> str:
    value = os.environ.get(name, default) if asked is None else asked
    if not isinstance(value, str) or value not in valid:
        raise InvalidArgument(f"{name}={told(value)}: expected one of {', '.join(valid)}")
    return value
