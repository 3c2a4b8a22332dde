"""Which command starts the ranks: the MPI's own launcher or the scheduler's, and how each is told.

By default it is the MPI's own, with the hosts by name, inside SLURM, PBS and LSF too. It needs no
plug-in that fits (Open MPI 5 speaks PMIx alone, MPICH from a wheel PMI alone, and SLURM may have
neither); it starts as fast (SLURM 22.05, 4 ranks on 2 nodes: mpirun 1.5 s, srun --mpi=pmix 1.6 s,
mpiexec 0.4 s, srun --mpi=pmi2 0.9 s); and under it a run can outlive ranks and hosts, while SLURM's
plug-in for PMIx ends the step with the first rank that dies. The hosts are named since an MPI need
not know the scheduler: Open MPI's wheel knows SLURM and PBS, but not LSF.

The scheduler's is the default where the MPI's own cannot be: in Flux, which no MPI's launcher
knows and whose nodes take no ssh; where LSF has jsrun, for Open MPI's kin; and where the library
has no launcher of its own, as on a Cray. (Of these, srun was run for real; the others by what
their manuals say.)
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl import mpi
from mpidl.cli import launcher
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mpidl.cli.allocation import Chosen
    from mpidl.cli.launcher import Library

INTEL_PMI = ("/usr/lib64/libpmi2.so", "/usr/lib64/slurm/libpmi2.so",
             "/usr/lib/x86_64-linux-gnu/libpmi2.so.0", "/opt/slurm/lib/libpmi2.so")  # fmt: skip
HANDS_OUT_GPUS = ("srun", "jsrun", "flux")
PLACES_ITSELF = "spreads the ranks evenly over the hosts"


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
        return [self.path, *OPTIONS[self.name](self, chosen, gpus)]

    def environment(self, chosen: Chosen) -> dict[str, str]:
        """Return what to add to the environment of the ranks."""
        hosts, cores = chosen.hosts, chosen.cores
        if not self.own and not chosen.named and chosen.allocation is None:
            hosts, cores = {"unknown": 1}, 1  # as it will be found
        added = launcher.environment(self.library, chosen.ranks, hosts, cores)
        pmi = next((path for path in INTEL_PMI if Path(path).exists()), None)
        if self.name == "srun" and self.library.vendor == "intel" and pmi:  # or all are alone
            added["I_MPI_PMI_LIBRARY"] = os.environ.get("I_MPI_PMI_LIBRARY", pmi)
        scheduler = chosen.allocation.scheduler if chosen.allocation else ""
        if self.own and scheduler == "LSF" and shutil.which("blaunch"):  # in place of ssh
            agents = {"PRTE_MCA_plm_ssh_agent": "blaunch", "OMPI_MCA_plm_rsh_agent": "blaunch"}
            if self.library.vendor == "openmpi":  # of 5, and before
                added |= {k: v for k, v in agents.items() if k not in os.environ}
        return added


def find() -> Library:
    """Return the MPI library; without a launcher of its own where a scheduler has one.

    Raises MPINotFound.
    """
    try:
        return launcher.find()
    except launcher.LauncherNotFound as error:
        if any(shutil.which(name) for name in ("srun", "jsrun", "flux", "aprun")) or _pals():
            return error.library
        raise


def choose(
    library: Library, chosen: Chosen, asked: str | None = None, for_own: str | None = None
) -> Starter:
    """Return the launcher to take: the one `asked` for, or else the default of this file.

    `for_own` is an option that only the MPI's own launcher can fulfil. Raises InvalidArgument.
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
    own = "mpiexec" if library.launcher is None else _kind(library.launcher)
    if for_own is not None:
        return own
    if os.environ.get("FLUX_URI") and shutil.which("flux"):
        return "flux"
    scheduler = chosen.allocation.scheduler if chosen.allocation else ""
    if scheduler == "LSF" and not chosen.named and library.vendor == "openmpi":
        own = "jsrun" if shutil.which("jsrun") else own
    if own == "jsrun" or library.launcher is not None or _pals():
        return own
    order = {"SLURM": ("srun",), "LSF": ("jsrun",), "PBS": ("aprun",)}
    names = (*order.get(scheduler, ()), "srun", "aprun", "jsrun", "flux")
    return next((name for name in names if shutil.which(name)), own)


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


# --- how each is told


def _each(counts: Mapping[str, int] | None) -> int | None:
    """Return the ranks of each host, where all have as many; else None."""
    numbers = set((counts or {}).values())
    return numbers.pop() if len(numbers) == 1 else None


def _evenly(starter: Starter, chosen: Chosen) -> int | None:
    """Return the ranks of each host, for those who spread them. Raises InvalidArgument."""
    if chosen.hosts is None:
        return chosen.ranks if chosen.allocation else None
    each = _each(chosen.hosts)
    if each is None and chosen.named:
        told = ",".join(f"{name}:{n}" for name, n in chosen.hosts.items())
        raise InvalidArgument(
            f"--hosts {told}: {starter.name} {PLACES_ITSELF}; expected as many on each, or "
            "--launcher mpirun, mpiexec or srun"
        )
    return each


def _cores(chosen: Chosen) -> int:
    """Return the cores of a rank: its share of its host's, or what its threads are to be."""
    most = max(chosen.hosts.values()) if chosen.hosts else chosen.ranks
    if chosen.cores is not None:
        return max(1, chosen.cores // most)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() and int(threads) else 1


def _srun(starter: Starter, chosen: Chosen, gpus: int | None) -> list[str]:
    hosts, each = chosen.hosts, _each(chosen.hosts)
    line = [f"--ntasks={chosen.ranks}"]
    if hosts and each is not None:
        line += [f"--nodes={len(hosts)}", f"--ntasks-per-node={each}"]
        if chosen.allocation is None or set(hosts) != set(chosen.allocation.hosts):
            line += [f"--nodelist={','.join(hosts)}"]
    elif hosts:
        spelled = ",".join(f"{name}*{n}" if n > 1 else name for name, n in hosts.items())
        line += [f"--nodes={len(hosts)}", "--distribution=arbitrary", f"--nodelist={spelled}"]
    elif chosen.allocation:
        line += ["--nodes=1", f"--ntasks-per-node={chosen.ranks}"]
        if len(chosen.allocation.hosts) > 1:
            line += [f"--nodelist={next(iter(chosen.allocation.hosts))}"]
    most = max(hosts.values()) if hosts else chosen.ranks
    if chosen.cores is not None and most > chosen.cores:
        line += ["--overcommit"]
    else:  # it is not taken from the job, and with one core all threads of a rank would share it
        line += [f"--cpus-per-task={_cores(chosen)}"]
    line += [] if gpus is None else [f"--gpus-per-task={gpus}"]
    plugin = _plugin(starter.library)
    line += [f"--mpi={plugin}"] if plugin else []
    return [*line, "--kill-on-bad-exit=1", "--export=ALL"]


def _plugin(library: Library) -> str | None:
    """Return SLURM's plug-in that this MPI speaks with. Raises InvalidArgument where none is."""
    there = mpi.srun_plugins()
    newest = sorted((n for n in there if n.startswith("pmix_")), key=len)[-1:]
    wanted = {"openmpi": ["pmix", *newest], "mpich": ["pmi2"], "intel": ["pmi2"]}.get(
        library.vendor, []
    )
    if library.vendor == "openmpi" and re.search(r" v?[1-4]\.", library.version):
        wanted += ["pmi2"]
    if "CRAY" in library.version:
        wanted = ["cray_shasta", *wanted]
    found = next((name for name in wanted if name in there), None)
    if wanted and there and found is None:
        raise InvalidArgument(
            f"--launcher srun: {library.version} needs --mpi={wanted[0]}, and this SLURM has "
            f"{', '.join(there)}; expected --launcher {launcher.NAMES[library.vendor][0]}"
        )
    return found or (wanted[0] if wanted else None)


def _flux(starter: Starter, chosen: Chosen, gpus: int | None) -> list[str]:
    each = _evenly(starter, chosen)
    line = ["run", f"--ntasks={chosen.ranks}", f"--cores-per-task={_cores(chosen)}"]
    if chosen.hosts and each is not None:
        line += [f"--nodes={len(chosen.hosts)}"]
    if chosen.hosts and chosen.named:
        line += [f"--requires=hosts:{','.join(chosen.hosts)}"]
    gpus = _gpus(chosen, each) if gpus is None else gpus
    line += [f"--gpus-per-task={gpus}"] if gpus else []
    return [*line, "-o", "pmi=pmix"] if starter.library.vendor == "openmpi" else line


def _gpus(chosen: Chosen, each: int | None) -> int:
    """Return the GPUs of a rank, if each is to have as many."""
    return chosen.allocation.gpus // each if chosen.allocation and each else 0


def _jsrun(starter: Starter, chosen: Chosen, gpus: int | None) -> list[str]:
    if chosen.named:
        raise InvalidArgument(
            "--hosts: jsrun chooses them itself; expected --launcher mpirun or mpiexec"
        )
    each, cores = _evenly(starter, chosen), str(_cores(chosen))
    line = ["--nrs", str(chosen.ranks), "--tasks_per_rs", "1", "--cpu_per_rs", cores]
    line += [] if gpus is None else ["--gpu_per_rs", str(gpus)]
    line += [] if each is None else ["--rs_per_host", str(each)]
    return [*line, "--launch_distribution", "packed", "--bind", f"packed:{cores}"]


def _aprun(starter: Starter, chosen: Chosen, _: int | None) -> list[str]:
    each = _evenly(starter, chosen)
    line = ["-n", str(chosen.ranks), "-d", str(_cores(chosen)), "-cc", "depth"]
    line += [] if each is None else ["-N", str(each)]
    return [*line, "-L", ",".join(chosen.hosts)] if chosen.named and chosen.hosts else line


def _mpiexec_of_pals(starter: Starter, chosen: Chosen, _: int | None) -> list[str]:
    each = _evenly(starter, chosen)
    line = ["-n", str(chosen.ranks), "--depth", str(_cores(chosen)), "--cpu-bind", "depth"]
    line += [] if each is None else ["--ppn", str(each)]
    line += ["--pmi=pmix"] if starter.library.vendor == "openmpi" else []
    return [*line, "--hosts", ",".join(chosen.hosts)] if chosen.named and chosen.hosts else line


OPTIONS: dict[str, Callable[[Starter, Chosen, int | None], list[str]]] = {
    "srun": _srun,
    "flux": _flux,
    "jsrun": _jsrun,
    "aprun": _aprun,
    "pals": _mpiexec_of_pals,
}
