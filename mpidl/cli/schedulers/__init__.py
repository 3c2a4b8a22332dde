"""The systems that jobs are handed to. One file each; their contract is in `base`."""

from __future__ import annotations

import shutil

from mpidl.cli.schedulers.base import Scheduler, State
from mpidl.cli.schedulers.flux import Flux
from mpidl.cli.schedulers.kubernetes import Kubernetes
from mpidl.cli.schedulers.lsf import LSF
from mpidl.cli.schedulers.pbs import PBS
from mpidl.cli.schedulers.slurm import Slurm
from mpidl.errors import InvalidArgument

__all__ = ["SCHEDULERS", "Scheduler", "State", "find"]

SCHEDULERS: dict[str, Scheduler] = {
    "slurm": Slurm(),
    "pbs": PBS(),
    "lsf": LSF(),
    "flux": Flux(),
    "kubernetes": Kubernetes(),
}


def find(name: str | None) -> tuple[str, Scheduler]:
    """Return the one of this name, or the first whose command is on PATH.

    Raises InvalidArgument. Kubernetes has to be named: who has kubectl, may have no MPI operator.
    """
    if name is not None:
        if name not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise InvalidArgument(f"scheduler {name!r}: expected one of {known}")
        return name, SCHEDULERS[name]
    for known, scheduler in SCHEDULERS.items():
        if known != "kubernetes" and shutil.which(scheduler.program):
            return known, scheduler
    programs = ", ".join(s.program for s in SCHEDULERS.values())
    raise InvalidArgument(
        f"no scheduler here: none of {programs} is on PATH; name one by --scheduler "
        "(with --dry-run the job script is only shown)"
    )
