"""PBS Pro and OpenPBS: qsub, qstat."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mpidl.cli.job import fill, settings
from mpidl.cli.schedulers import base
from mpidl.cli.schedulers.base import SchedulerFailed, State
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from mpidl.cli.job import Job

STATES = {"Q": "queued", "H": "queued", "W": "queued", "T": "queued", "S": "queued",
          "U": "queued", "M": "queued", "R": "running", "E": "running", "B": "running"}  # fmt: skip


class PBS:
    """`launch/pbs.sh`. What is to go on is submitted again: qrerun is for operators."""

    program = "qsub"
    script = "job.sh"

    def seconds(self, time: str) -> int:
        """Return the time limit, in seconds."""
        return base.limit(time, (3600, 60, 1), "seconds, M:SS or H:MM:SS")

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for an array that PBS does not take."""
        if job.array is not None and not re.fullmatch(
            r"[0-9]+-[0-9]+(:[0-9]+)?(%[0-9]+)?", job.array
        ):
            raise InvalidArgument(f"array {job.array!r}: expected such as 0-9 or 0-9:3")

    def render(self, job: Job, templates: Path) -> str:
        """Return the job script."""
        cores = job.ranks_per_node * job.cpus_per_rank
        chunk = f"{job.nodes}:ncpus={cores}:mpiprocs={job.ranks_per_node}"
        directives = {
            "-N ": job.name,
            "-l select=": chunk + (f":ngpus={job.gpus_per_node}" if job.gpus_per_node else ""),
            "-l walltime=": base.clock(job.seconds),
            "-A ": job.account,
            "-q ": job.partition,
            "-J ": job.array,
        }
        lines = {
            **settings(job, base.inside(job, ["--nv"] * bool(job.gpus_per_node))),
            "export OMP_NUM_THREADS=": str(job.cpus_per_rank),
            "gpus_per_node=": str(job.gpus_per_node),
            "script=": self.script,
            "train_seconds=": str(job.seconds - job.stop_seconds),
        }
        title = "Made by mpidl submit from launch/pbs.sh. By hand, in this folder: qsub job.sh"
        return fill((templates / "pbs.sh").read_text(), title, "#PBS", directives, lines, job)

    def submit(self, folder: Path) -> str:
        """Submit, and return the job's id, such as 123.server or 123[].server."""
        return base.job_id(r"^([0-9]+\S*)\s*$", base.ask([self.program, self.script], cwd=folder))

    def state(self, job_id: str) -> State:
        """Ask qstat, of ended jobs too."""
        try:
            told = base.ask(["qstat", "-x", "-f", job_id])
        except SchedulerFailed as error:
            if "nknown" in str(error):  # Unknown Job Id
                return State("unknown", "unknown", "PBS has forgotten it")
            raise
        found: dict[str, str] = dict(re.findall(r"^\s+(\S+) = (.*)$", told, re.MULTILINE))
        word, status = found.get("job_state", "?"), found.get("Exit_status", "")
        if word in STATES:
            return State(STATES[word], word, found.get("comment", found.get("exec_host", "")))
        ended = {"0": "finished", "": "unknown"}.get(status, "failed")
        return State(ended, word, f"exit status {status}" if status else "")
