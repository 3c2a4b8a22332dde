"""How the schedulers' launchers are told what to start: their spelling of each option.

srun was run for real (SLURM 22.05, both MPIs), the others are written from their manuals: flux run
of flux-core, IBM's jsrun, aprun of Cray's ALPS, and the mpiexec of HPE's PALS.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from mpidl import mpi
from mpidl.cli import launcher
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mpidl.cli.allocation import Chosen
    from mpidl.cli.launcher import Library


def _each(counts: Mapping[str, int] | None) -> int | None:
    """Return the ranks of each host, where all have as many; else None."""
    numbers = set((counts or {}).values())
    return numbers.pop() if len(numbers) == 1 else None


def _evenly(chosen: Chosen) -> int | None:
    """Return the ranks of each host, for those who spread them. Raises InvalidArgument."""
    if chosen.hosts is None:
        return chosen.ranks if chosen.allocation else None
    each = _each(chosen.hosts)
    if each is None and chosen.named:
        told = ",".join(f"{name}:{n}" for name, n in chosen.hosts.items())
        raise InvalidArgument(
            f"--hosts {told}: this launcher spreads ranks evenly; expected as many on each, or "
            "--launcher mpirun or mpiexec"
        )
    return each


def _cores(chosen: Chosen) -> int:
    """Return the cores of a rank: its share of its host's, or what its threads are to be."""
    most = max(chosen.hosts.values()) if chosen.hosts else chosen.ranks
    if chosen.cores is not None:
        return max(1, chosen.cores // most)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() and int(threads) else 1


def _srun(library: Library, chosen: Chosen, gpus: int | None) -> list[str]:
    hosts, each = chosen.hosts, _each(chosen.hosts)
    line = [f"--ntasks={chosen.ranks}"]
    if hosts:
        line += [f"--nodes={len(hosts)}"]
        line += [] if each is None else [f"--ntasks-per-node={each}"]
        if each is None and chosen.named:
            line += _one_by_one(library, hosts)
        elif chosen.allocation is None or set(hosts) != set(chosen.allocation.hosts):
            line += [f"--nodelist={','.join(hosts)}"]
    elif chosen.allocation:  # of one host
        line += ["--nodes=1", f"--ntasks-per-node={chosen.ranks}"]
    most = max(hosts.values()) if hosts else chosen.ranks
    if chosen.cores is not None and most > chosen.cores:
        line += ["--overcommit"]
    else:  # it is not taken from the job, and with one core all threads of a rank would share it
        line += [f"--cpus-per-task={_cores(chosen)}"]
    line += [] if gpus is None else [f"--gpus-per-task={gpus}"]
    plugin = _plugin(library)
    line += [f"--mpi={plugin}"] if plugin else []
    return [*line, "--kill-on-bad-exit=1", "--export=ALL"]


def _one_by_one(library: Library, hosts: Mapping[str, int]) -> list[str]:
    """Return how unequal numbers are told. Raises InvalidArgument where that does not work.

    SLURM then tells PMI nothing of who shares a host: ranks of MPICH 5 waited for each other for
    ever, or found each on a host of its own. (A host's name with *2 is not known to SLURM 22.05.)
    """
    if library.vendor != "openmpi":
        told = ",".join(f"{name}:{n}" for name, n in hosts.items())
        raise InvalidArgument(
            f"--hosts {told}: with srun, {library.version} needs as many ranks on each; expected "
            "that, or --launcher mpiexec"
        )
    names = [name for name, n in hosts.items() for _ in range(n)]
    return ["--distribution=arbitrary", f"--nodelist={','.join(names)}"]


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


def _flux(library: Library, chosen: Chosen, gpus: int | None) -> list[str]:
    each = _evenly(chosen)
    line = ["run", f"--ntasks={chosen.ranks}", f"--cores-per-task={_cores(chosen)}"]
    if chosen.hosts and each is not None:
        line += [f"--nodes={len(chosen.hosts)}"]
    if chosen.hosts and chosen.named:
        line += [f"--requires=hosts:{','.join(chosen.hosts)}"]
    gpus = _gpus(chosen, each) if gpus is None else gpus
    line += [f"--gpus-per-task={gpus}"] if gpus else []
    return [*line, "-o", "pmi=pmix"] if library.vendor == "openmpi" else line


def _gpus(chosen: Chosen, each: int | None) -> int:
    """Return the GPUs of a rank, if each is to have as many."""
    return chosen.allocation.gpus // each if chosen.allocation and each else 0


def _jsrun(_: Library, chosen: Chosen, gpus: int | None) -> list[str]:
    if chosen.named:
        raise InvalidArgument(
            "--hosts: jsrun chooses them itself; expected --launcher mpirun or mpiexec"
        )
    each, cores = _evenly(chosen), str(_cores(chosen))
    line = ["--nrs", str(chosen.ranks), "--tasks_per_rs", "1", "--cpu_per_rs", cores]
    line += [] if gpus is None else ["--gpu_per_rs", str(gpus)]
    line += [] if each is None else ["--rs_per_host", str(each)]
    return [*line, "--launch_distribution", "packed", "--bind", f"packed:{cores}"]


def _aprun(_: Library, chosen: Chosen, __: int | None) -> list[str]:
    each = _evenly(chosen)
    line = ["-n", str(chosen.ranks), "-d", str(_cores(chosen)), "-cc", "depth"]
    line += [] if each is None else ["-N", str(each)]
    return [*line, "-L", ",".join(chosen.hosts)] if chosen.named and chosen.hosts else line


def _mpiexec_of_pals(library: Library, chosen: Chosen, _: int | None) -> list[str]:
    each = _evenly(chosen)
    line = ["-n", str(chosen.ranks), "--depth", str(_cores(chosen)), "--cpu-bind", "depth"]
    line += [] if each is None else ["--ppn", str(each)]
    line += ["--pmi=pmix"] if library.vendor == "openmpi" else []
    return [*line, "--hosts", ",".join(chosen.hosts)] if chosen.named and chosen.hosts else line


OPTIONS: dict[str, Callable[[Library, Chosen, int | None], list[str]]] = {
    "srun": _srun,
    "flux": _flux,
    "jsrun": _jsrun,
    "aprun": _aprun,
    "pals": _mpiexec_of_pals,
}
