"""IBM Spectrum LSF: bsub, bjobs."""

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

STATES = {"PEND": "queued", "PSUSP": "queued", "USUSP": "queued", "SSUSP": "queued",
          "WAIT": "queued", "PROV": "queued", "RUN": "running", "DONE": "finished",
          "EXIT": "failed"}  # fmt: skip


class LSF:
    """`launch/lsf.sh`. LSF itself queues a job again that ends with status 75."""

    program = "bsub"
    script = "job.sh"

    def seconds(self, time: str) -> int:
        """Return the time limit, in seconds; LSF itself counts minutes."""
        return base.limit(time, (3600, 60), "minutes, H:MM or H:MM:SS")

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for an array that LSF does not take."""
        indices = r"[1-9][0-9]*(-[0-9]+(:[0-9]+)?)?"
        if job.array is not None and not re.fullmatch(
            rf"{indices}(,{indices})*(%[0-9]+)?", job.array
        ):
            raise InvalidArgument(f"array {job.array!r}: expected such as 1-10, 1,3,5 or 1-99%4")

    def render(self, job: Job, templates: Path) -> str:
        """Return the job script."""
        minutes = -(-job.seconds // 60)
        cores = job.ranks_per_node * job.cpus_per_rank
        indices, percent, at_once = (job.array or "").partition("%")
        array = f"{job.name}[{indices}]{percent}{at_once}"
        directives = {
            "-J ": job.name if job.array is None else f'"{array}"',
            "-n ": str(job.nodes * cores),  # slots are cores
            "-R ": f'"span[ptile={cores}]"',
            "-W ": f"{minutes // 60}:{minutes % 60:02}",
            "-wt ": str(max(1, -(-job.stop_seconds // 60))),
            "-o ": "lsf-%J.log" if job.array is None else "lsf-%J-%I.log",
            "-gpu ": f"num={job.gpus_per_node}" if job.gpus_per_node else None,
            "-P ": job.account,
            "-q ": job.partition,
        }
        lines = {
            **settings(job, base.inside(job, ["--nv"] * bool(job.gpus_per_node))),
            "export OMP_NUM_THREADS=": str(job.cpus_per_rank),
            "ranks=": str(job.ranks),
            "nodes=": str(job.nodes),
            "gpus_per_node=": str(job.gpus_per_node),
        }
        title = "Made by mpidl submit from launch/lsf.sh. By hand, in this folder: bsub < job.sh"
        return fill((templates / "lsf.sh").read_text(), title, "#BSUB", directives, lines, job)

    def submit(self, folder: Path) -> str:
        """Submit, and return the job's number."""
        printed = base.ask([self.program], cwd=folder, stdin=folder / self.script)
        return base.job_id(r"^Job <([0-9]+)>", printed)

    def state(self, job_id: str) -> State:
        """Ask bjobs, of ended jobs too."""
        fields = "stat exit_code exec_host delimiter='|'"
        told = base.ask(["bjobs", "-a", "-noheader", "-o", fields, job_id])
        rows = [line.split("|") for line in told.splitlines() if line.count("|") == 2]
        if not rows:
            return State("unknown", "unknown", "LSF has forgotten it")
        states = [STATES.get(row[0], "unknown") for row in rows]
        if len(rows) > 1:  # of an array
            return base.of_array(states)
        (word, status, host), state = rows[0], states[0]
        detail = {"running": f"on {host}", "failed": f"exit status {status}"}.get(state, "")
        return State(state, word, detail)
