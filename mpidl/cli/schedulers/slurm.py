"""SLURM: sbatch, scontrol, sacct, sinfo."""

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

FORMATS = "minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS"
STATES = {  # all others are ends that are failures
    "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued", "RESV_DEL_HOLD": "queued", "SPECIAL_EXIT": "queued",
    "SUSPENDED": "queued", "RUNNING": "running", "COMPLETING": "running", "STAGE_OUT": "running",
    "RESIZING": "running", "SIGNALING": "running", "STOPPED": "running", "COMPLETED": "finished",
}  # fmt: skip


class Slurm:
    """`launch/slurm_cpu.sbatch`, and `slurm_gpu.sbatch` where GPUs are asked for."""

    program = "sbatch"
    script = "job.sh"

    def seconds(self, time: str) -> int:
        """Return the time limit, in seconds; SLURM itself counts minutes."""
        days, dash, rest = time.partition("-")
        if dash and re.fullmatch(r"[0-9]{1,3}", days):
            rest = rest if ":" in rest else f"{rest}:0"
            found = base.parts(rest if rest.count(":") > 1 else f"{rest}:0", (3600, 60, 1))
            found = None if found is None else found + int(days) * 86400
        else:
            found = base.three_parts(time)
            if found is None and time.count(":") < 2:
                found = base.parts(time if ":" in time else f"{time}:0", (60, 1))
        if not found:
            raise base.no_time(time, FORMATS)
        return found

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for what no node of the partition has."""
        if job.array is not None and not re.fullmatch(
            r"[0-9]+(-[0-9]+(:[0-9]+)?)?(,[0-9]+(-[0-9]+(:[0-9]+)?)?)*(%[0-9]+)?", job.array
        ):
            raise InvalidArgument(f"array {job.array!r}: expected such as 0-9, 1,3,5 or 0-99%4")
        try:
            kinds = base.ask(
                ["sinfo", "-h", "-e", "-o", "%P|%D|%c|%G|%l"]
                + (["-p", job.partition] if job.partition else [])
            )
        except SchedulerFailed:
            return  # sbatch will say
        found = [line.split("|") for line in kinds.splitlines() if line.count("|") == 4]
        if not job.partition:
            found = [words for words in found if words[0].endswith("*")] or found
        if not found:
            if job.partition:
                raise InvalidArgument(f"partition {job.partition!r}: sinfo knows none")
            return
        where = f"of partition {job.partition}" if job.partition else "of the default partition"
        nodes = sum(int(words[1]) for words in found)
        cores = max(int(re.sub(r"\D", "", words[2]) or 0) for words in found)
        gpus = max(_gpus(words[3]) for words in found)
        if job.nodes > nodes:
            raise InvalidArgument(f"nodes={job.nodes}: expected at most the {nodes} {where}")
        wanted = job.ranks_per_node * job.cpus_per_rank
        if wanted > cores:
            raise InvalidArgument(
                f"{job.ranks_per_node} ranks of {job.cpus_per_rank} cores on a node: expected at "
                f"most the {cores} cores of a node {where}"
            )
        if job.gpus_per_node > gpus:
            raise InvalidArgument(
                f"gpus-per-node={job.gpus_per_node}: expected at most the {gpus} GPUs of a node "
                f"{where}"
            )
        limits = [_limit(words[4]) for words in found]
        longest = None if None in limits else max(limit or 0 for limit in limits)
        if longest and job.seconds > longest:
            raise InvalidArgument(
                f"time {base.clock(job.seconds)}: expected at most {base.clock(longest)}, the "
                f"limit {where}"
            )

    def render(self, job: Job, templates: Path) -> str:
        """Return the job script."""
        kind = "slurm_gpu.sbatch" if job.gpus_per_node else "slurm_cpu.sbatch"
        directives = {
            "--job-name=": job.name,
            "--nodes=": str(job.nodes),
            "--ntasks-per-node=": str(job.ranks_per_node),
            "--cpus-per-task=": str(job.cpus_per_rank),
            "--gpus-per-node=": str(job.gpus_per_node) if job.gpus_per_node else None,
            "--time=": base.clock(job.seconds),
            "--output=": "job.log" if job.array is None else "job-%a.log",
            "--signal=": f"B:USR1@{job.stop_seconds}",
            "--account=": job.account,
            "--partition=": job.partition,
            "--array=": job.array,
        }
        gpu = ["--nv"] * bool(job.gpus_per_node)
        text = (templates / kind).read_text()
        title = f"Made by mpidl submit from launch/{kind}. By hand, in this folder: sbatch job.sh"
        return fill(text, title, "#SBATCH", directives, settings(job, base.inside(job, gpu)), job)

    def submit(self, folder: Path) -> str:
        """Submit, and return the job's number."""
        printed = base.ask([self.program, "--parsable", self.script], cwd=folder)
        return base.job_id(r"^([0-9]+)(?:;.*)?$", printed)

    def state(self, job_id: str) -> State:
        """Ask scontrol, which knows of the last minutes, then the accounting."""
        try:
            told = base.ask(["scontrol", "show", "job", "-o", job_id])
        except SchedulerFailed as error:
            return self._from_accounting(job_id, error)
        jobs = [dict(_pairs(line)) for line in told.splitlines() if "JobState=" in line]
        if not jobs:
            return State("unknown", "unknown", "scontrol says nothing of it")
        states = [_state(job["JobState"]) for job in jobs]
        if len(jobs) > 1:  # of an array
            return base.of_array(states)
        job, state = jobs[0], states[0]
        detail = {
            "queued": job.get("Reason", ""),
            "running": f"{job.get('RunTime', '')} of {job.get('TimeLimit', '')} on "
            f"{job.get('NodeList', '')}",
        }.get(state, f"exit status {job.get('ExitCode', '').split(':')[0]}")
        return State(state, job["JobState"], "" if detail == "None" else detail)

    def _from_accounting(self, job_id: str, error: SchedulerFailed) -> State:
        try:
            told = base.ask(["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State,ExitCode"])
        except SchedulerFailed:
            if "Invalid job id" in str(error):
                return State("unknown", "unknown", "SLURM has forgotten it")
            raise error from None
        words = [line.split("|") for line in told.splitlines() if line.count("|") == 1]
        if not words:
            return State("unknown", "unknown", "SLURM has forgotten it")
        state, status = words[-1]
        return State(_state(state), state, f"exit status {status.split(':')[0]}")


def _state(word: str) -> str:
    return STATES.get(word.split()[0].rstrip("+") if word else "", "failed")


def _pairs(line: str) -> list[tuple[str, str]]:
    found = (word.partition("=") for word in line.split())
    return [(name, value) for name, equals, value in found if equals]


def _gpus(text: str) -> int:
    """Return the GPUs in a list of generic resources, such as "gpu:a100:4(S:0-1),nvme:1"."""
    found = re.findall(r"(?:^|,)gpu(?::[^:,(]+)*?:([0-9]+)(?=[,(]|$)", text)
    return sum(map(int, found))


def _limit(text: str) -> int | None:
    if text in ("infinite", "n/a"):
        return None
    try:
        return Slurm().seconds(text)
    except InvalidArgument:
        return None
