"""Flux: flux batch, flux jobs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mpidl.cli.job import fill, settings
from mpidl.cli.schedulers import base
from mpidl.cli.schedulers.base import State
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from mpidl.cli.job import Job

UNITS = {"s": 1, "m": 60, "": 60, "h": 3600, "d": 86400}
STATES = {"PENDING": "queued", "DEPEND": "queued", "PRIORITY": "queued", "SCHED": "queued",
          "RUNNING": "running", "RUN": "running", "CLEANUP": "running",
          "COMPLETED": "finished"}  # fmt: skip
LATE = 30  # seconds: the ranks' own time limit ends so long before that of the job


class Flux:
    """`launch/flux.sh`. What is to go on is submitted again."""

    program = "flux"
    script = "job.sh"

    def seconds(self, time: str) -> int:
        """Return the time limit, in seconds."""
        found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)([smhd]?)", time)
        seconds = int(float(found[1]) * UNITS[found[2]]) if found else base.three_parts(time)
        if not seconds:
            raise base.no_time(time, "minutes, 90s, 30m, 2h, 1d or H:MM:SS")
        return seconds

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for what Flux cannot do."""
        if job.array is not None:
            raise InvalidArgument("array: Flux has none; expected slurm, pbs or lsf")
        if job.gpus_per_node % job.ranks_per_node:
            raise InvalidArgument(
                f"{job.gpus_per_node} GPUs and {job.ranks_per_node} ranks on a node: expected as "
                "many GPUs for each rank"
            )
        if job.launcher is not None and not job.launcher[0].endswith("flux"):
            raise InvalidArgument(
                f"launcher {job.launcher[0]!r}: expected flux run, which sends the signal"
            )

    def render(self, job: Job, templates: Path) -> str:
        """Return the job script."""
        gpus = job.gpus_per_node // job.ranks_per_node
        directives = {
            "--job-name=": job.name,
            "--nodes=": str(job.nodes),
            "--nslots=": str(job.ranks),
            "--cores-per-slot=": str(job.cpus_per_rank),
            "--gpus-per-slot=": str(gpus) if gpus else None,
            "--time-limit=": f"{job.seconds}s",
            "--output=": "job.log",
            "--bank=": job.account,
            "--queue=": job.partition,
        }
        late = min(LATE, job.stop_seconds // 2)
        lines = {
            **settings(job, base.inside(job, ["--nv"] * bool(gpus))),
            "export OMP_NUM_THREADS=": str(job.cpus_per_rank),
            "ranks=": str(job.ranks),
            "nodes=": str(job.nodes),
            "gpus_per_rank=": str(gpus),
            "script=": self.script,
            "train_seconds=": str(job.seconds - late),
            "stop_seconds=": str(job.stop_seconds - late),
        }
        title = (
            "Made by mpidl submit from launch/flux.sh. By hand, in this folder: flux batch job.sh"
        )
        return fill((templates / "flux.sh").read_text(), title, "# flux:", directives, lines, job)

    def submit(self, folder: Path) -> str:
        """Submit, and return the job's id."""
        return base.job_id(r"^(\S+)\s*$", base.ask([self.program, "batch", self.script], folder))

    def state(self, job_id: str) -> State:
        """Ask flux jobs, of ended jobs too."""
        form = "{status}|{nodelist}|{returncode}"
        told = base.ask([self.program, "jobs", "-a", "-n", "-o", form, job_id])
        words = told.strip().split("|")
        if len(words) != 3:
            return State("unknown", "unknown", "Flux has forgotten it")
        word, nodes, status = words
        state = STATES.get(word, "failed")
        detail = f"on {nodes}" if state == "running" else f"exit status {status}" if status else ""
        return State(state, word, detail)
