"""Which command starts the ranks: the MPI's own launcher or the scheduler's, and how each is told.

By default it is the MPI's own, with the hosts by name, inside SLURM, PBS and LSF too. It needs no
plug-in that fits (Open MPI 5 speaks PMIx alone, MPICH from a wheel PMI alone, and SLURM may have
neither); it starts as fast (SLURM 22.05, 4 ranks on 2 nodes: mpirun 1.5 s, srun --mpi=pmix 1.6 s,
mpiexec 0.4 s, srun --mpi=pmi2 0.9 s); and under it a run can outlive ranks and hosts, while SLURM's
plug-in for PMIx ends the step with the first rank that dies. The hosts are named since an MPI need
not know the scheduler: Open MPI's wheel knows SLURM and PBS, but not LSF.

The scheduler's is the default where the MPI's own cannot be: in Flux, which no MPI's launcher
knows and whose nodes take no ssh; where LSF has jsrun, for Open MPI's kin; and in a job of SLURM
or PBS where the library has no launcher of its own, as on a Cray. How each is told
stands in mpidl/cli/dialects.py.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl.cli import allocation, dialects, launcher
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpidl.cli.allocation import Chosen
    from mpidl.cli.launcher import Library

INTEL_PMI = ("/usr/lib64/libpmi2.so", "/usr/lib64/slurm/libpmi2.so",
             "/usr/lib/x86_64-linux-gnu/libpmi2.so.0", "/opt/slurm/lib/libpmi2.so")  # fmt: skip
HANDS_OUT_GPUS = ("srun", "jsrun", "flux")


class Name(str, Enum):
    """What `mpidl run --launcher` takes."""

    srun = "srun"
    mpirun = "mpirun"
    mpiexec = "mpiexec"
    jsrun = "jsrun"
    flux = "flux"
    aprun = "aprun"


@dataclass(frozen=True)
class Starter:
    """The command that starts the ranks."""

    name: str  #: of Name, or "pals" for HPE's mpiexec
    library: Library  #: whose launcher it is, where it is the MPI's own
    path: str
    own: bool

    def options(
        self,
        chosen: Chosen,
        environment: Iterable[str] = (),
        *,
        elastic: bool = False,
        replace: bool = False,
        gpus: int | None = None,
    ) -> list[str]:
        """Return the command and its options, up to where the program follows.

        `gpus` are those of a rank, and all else is as in `launcher.options`. Raises
        InvalidArgument for what this launcher cannot do.
        """
        if gpus is not None and self.name not in HANDS_OUT_GPUS:
            raise InvalidArgument(
                f"--gpus-per-rank: {self.name} hands out none, and each rank takes the GPU of its "
                f"number on its host; expected --launcher {', '.join(HANDS_OUT_GPUS)}"
            )
        if self.own:
            return launcher.options(
                self.library, chosen.ranks, chosen.hosts, environment,
                elastic=elastic, replace=replace,
            )  # fmt: skip
        return [self.path, *dialects.OPTIONS[self.name](self.library, chosen, gpus)]

    def environment(self, chosen: Chosen) -> dict[str, str]:
        """Return what to add to the environment of the ranks."""
        hosts, cores = chosen.hosts, chosen.cores
        if not self.own and not chosen.named and chosen.allocation is None:
            hosts, cores = {"unknown": 1}, 1  # as it will be found
        added = launcher.environment(self.library, chosen.ranks, hosts, cores)
        if self.name == "srun" and self.library.vendor == "intel":  # without it all are alone
            there = [path for path in INTEL_PMI if Path(path).exists()]
            if there and "I_MPI_PMI_LIBRARY" not in os.environ:
                added["I_MPI_PMI_LIBRARY"] = there[0]
        scheduler = chosen.allocation.scheduler if chosen.allocation else ""
        if scheduler == "SLURM":
            added |= allocation.of_the_job()
        if self.own and scheduler == "LSF" and shutil.which("blaunch"):  # in place of ssh
            agents = {"PRTE_MCA_plm_ssh_agent": "blaunch", "OMPI_MCA_plm_rsh_agent": "blaunch"}
            if self.library.vendor == "openmpi":  # of 5, and before
                added |= {k: v for k, v in agents.items() if k not in os.environ}
        return added


def find() -> Library:
    """Return the MPI library, also without a launcher of its own. Raises MPINotFound."""
    try:
        return launcher.find()
    except launcher.LauncherNotFound as error:
        return error.library


def choose(
    library: Library, chosen: Chosen, asked: str | None = None, for_own: str | None = None
) -> Starter:
    """Return the launcher to take: the one `asked` for, or else the default of this file.

    `for_own` is an option that only the MPI's own launcher can fulfil. Raises InvalidArgument, and
    MPINotFound where there is no launcher.
    """
    name = asked or _default(library, chosen, for_own)
    if name in ("mpirun", "mpiexec"):
        path = launcher.named(library, name) if asked else library.launcher
        if path is not None:
            return Starter(name, replace(library, launcher=path), path, own=True)
        pals = _pals() if name == "mpiexec" else None
        if pals is None:
            raise InvalidArgument(
                f"--launcher {name}: {library.version} has none beside it or on PATH; expected "
                f"{_there(library)}"
            )
        name, path = "pals", pals
    else:
        path = shutil.which(name)
        if path is None:
            raise InvalidArgument(
                f"--launcher {name}: no {name} on PATH; expected {_there(library)}"
            )
    if for_own is not None:
        raise InvalidArgument(
            f"{for_own}: {name} ends all ranks with the first; expected the MPI's own launcher, "
            f"{launcher.NAMES[library.vendor][0]}"
        )
    return Starter(name, library, path, own=False)


def _default(library: Library, chosen: Chosen, for_own: str | None) -> str:
    scheduler = chosen.allocation.scheduler if chosen.allocation else ""
    if for_own is None and os.environ.get("FLUX_URI") and shutil.which("flux"):
        return "flux"
    by_jsrun = scheduler == "LSF" and not chosen.named and library.vendor == "openmpi"
    if for_own is None and by_jsrun and shutil.which("jsrun"):
        return "jsrun"
    if library.launcher is not None:
        return _kind(library.launcher)
    if _pals():
        return "mpiexec"
    # outside of a job srun would queue for one, which nobody has asked for
    for name in {"SLURM": ("srun", "aprun"), "PBS": ("aprun",)}.get(scheduler, ()):
        if shutil.which(name):
            return name
    launcher.check(library)
    raise AssertionError("it has no launcher")


def _kind(path: str) -> str:
    return "mpirun" if Path(path).name.startswith("mpirun") else "mpiexec"


def _pals() -> str | None:
    """Return HPE's mpiexec, of PALS, if that is the one on PATH: it lies in /opt/cray/pals."""
    path = shutil.which("mpiexec")
    return path if path and "pals" in Path(path).resolve().parts else None


def _there(library: Library) -> str:
    found = [name.value for name in Name if name.value not in ("mpirun", "mpiexec")
             and shutil.which(name.value)]  # fmt: skip
    own = [] if library.launcher is None else [_kind(library.launcher)]
    return " or ".join(own + found) or "another launcher, and none is here"
