"""What launchers tell the ranks that they start, by environment variables."""

from __future__ import annotations

import os

#: Variables by which launchers tell their ranks how many there are, and the launchers.
SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun", "MV2_COMM_WORLD_SIZE": "mpirun_rsh", "PMI_SIZE": "mpiexec",
    "JSM_NAMESPACE_SIZE": "jsrun", "FLUX_JOB_SIZE": "flux run", "SLURM_STEP_NUM_TASKS": "srun",
    "PALS_LOCAL_SIZE": "PALS",  # of this host, at least
}  # fmt: skip
RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK",
         "FLUX_TASK_RANK", "PALS_RANKID", "ALPS_APP_PE", "PMIX_RANK", "SLURM_PROCID")  # fmt: skip
#: What MPI libraries look for to find their launcher: without it each process is a job of its own.
TRACES = ("OMPI_COMM_", "PMIX_", "PMI_", "PRTE_", "HYDRA_")  # names begin so
SLURM_SPECIAL_STEPS = 0xFFFFFFF0  # of slurm.h: numbers of steps from here on are no users' steps

_number: int | None = None  # what `rank` returns where the launcher is forgotten


def size() -> tuple[str, int] | None:
    """Return the variable with which a launcher tells the number of ranks, and that number.

    The innermost launcher's comes first: in a job step, mpirun's own are there beside SLURM's. A
    step's count is used and not the job's, which is set in batch scripts too. Where a launcher
    tells no number, one above rank 0 knows that there are as many as its own, at least.
    """
    for name in SIZES:
        value = os.environ.get(name, "")
        if value.isdecimal() and not (name == "SLURM_STEP_NUM_TASKS" and _no_step_of_ranks()):
            return name, int(value)
    for name in ("PALS_RANKID", "ALPS_APP_PE", "PMIX_RANK"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return name, int(value) + 1
    return None


def by() -> str:
    """Return the launcher that has set what `size` found, as its command is called."""
    name, ranks = size() or ("", 1)
    if "JSM_NAMESPACE_RANK" in os.environ:  # it sets Open MPI's variables too
        return "jsrun"
    if name == "PMI_SIZE" and "MPI_LOCALNRANKS" not in os.environ:  # that is Hydra's own
        for other in ("FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS"):  # who speak PMI as well
            if os.environ.get(other) == str(ranks):
                return SIZES[other]
    if "PALS_RANKID" in os.environ and not name.startswith("OMPI_"):
        return "PALS"
    return SIZES.get(name, "aprun" if name == "ALPS_APP_PE" else "a launcher")


def forget() -> None:
    """Remove what tells MPI of a launcher, so that it starts for this process alone."""
    global _number
    _number = rank()
    for name in [name for name in os.environ if name.startswith(TRACES)]:
        del os.environ[name]


def rank() -> int:
    """Return this rank's number, as the launcher tells it before MPI starts; 0 where none does."""
    if _number is not None:
        return _number
    for name in RANKS:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def speaks_pmix() -> bool:
    """Whether the launcher offers PMIx to this rank."""
    return "PMIX_RANK" in os.environ or "PMIX_NAMESPACE" in os.environ


def speaks_pmi() -> bool:
    """Whether the launcher offers PMI 1 or 2 to this rank."""
    return any(name in os.environ for name in ("PMI_FD", "PMI_PORT", "PMI_RANK"))


def _no_step_of_ranks() -> bool:
    """Whether SLURM's step is that of a batch script, or of a shell, by its number."""
    value = os.environ.get("SLURM_STEP_ID", "")
    return value.isdecimal() and int(value) >= SLURM_SPECIAL_STEPS


def found() -> bool:
    """Whether any launcher started this process: all speak PMIx or PMI with their ranks."""
    return any(name.startswith(("PMIX_", "PMI_", "PMI2_", "OMPI_COMM_")) for name in os.environ)


def without() -> dict[str, str]:
    """Return the environment without what a launcher adds, so that a child is a job of its own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(TRACES)}
