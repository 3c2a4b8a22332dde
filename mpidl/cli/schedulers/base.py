"""What `mpidl submit` and `mpidl status` need to know of a scheduler."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpidl.errors import InvalidArgument, MpidlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.cli.job import Job

SECONDS = 20  # a scheduler that does not answer
ACTIVE = ("queued", "running")


class SchedulerFailed(MpidlError):
    """The scheduler's own command failed, or is missing."""


@dataclass(frozen=True)
class State:
    """What a scheduler says of a job."""

    state: str  #: queued, running, finished, failed, or unknown
    word: str  #: the scheduler's own, such as PENDING
    detail: str = ""  #: where it runs, why it waits, how it ended

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


class Scheduler(Protocol):
    """A system that takes job scripts."""

    program: str  #: that submits
    script: str  #: what a job script is called in the folder of a run

    def seconds(self, time: str) -> int:
        """Return the time limit that `time` is for this scheduler. Raises InvalidArgument."""

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for what this scheduler, or this cluster, cannot do."""

    def render(self, job: Job, templates: Path) -> str:
        """Return the job script, made from a template in the folder `templates`."""

    def submit(self, folder: Path) -> str:
        """Submit the script in the folder of a run; return the job's id."""

    def state(self, job_id: str) -> State:
        """Ask for a job. Raises SchedulerFailed where the scheduler cannot be asked."""


def ask(command: Sequence[str], cwd: Path | None = None, stdin: Path | None = None) -> str:
    """Return what a command of a scheduler prints. Raises SchedulerFailed."""
    try:
        with (stdin or Path(os.devnull)).open() as given:
            done = subprocess.run(
                command, cwd=cwd, stdin=given, capture_output=True, text=True, errors="replace",
                check=False, timeout=SECONDS,
            )  # fmt: skip
    except FileNotFoundError as error:
        raise SchedulerFailed(f"{command[0]}: not found") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerFailed(f"{command[0]}: no answer for {SECONDS} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise SchedulerFailed(f"{command[0]}: exit status {done.returncode}: {said[-1]}")
    return done.stdout


def job_id(pattern: str, output: str) -> str:
    """Return the job's id out of what a submitting command printed. Raises SchedulerFailed."""
    found = re.search(pattern, output, re.MULTILINE)
    if found is None:
        raise SchedulerFailed(f"no job id in {output.strip()!r}")
    return found[1]


def three_parts(time: str) -> int | None:
    """Return the seconds of H:MM:SS or D-H:MM:SS, which mean the same everywhere; else None."""
    found = re.fullmatch(r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])", time)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parts(time: str, units: Sequence[int]) -> int | None:
    """Return the seconds of numbers between colons, the last in `units`[-1] seconds; else None."""
    if not re.fullmatch(r"[0-9]{1,6}(:[0-5]?[0-9])*", time) or time.count(":") >= len(units):
        return None
    numbers = list(map(int, time.split(":")))
    return sum(n * unit for n, unit in zip(numbers, units[-len(numbers) :], strict=True))


def limit(time: str, units: Sequence[int], formats: str) -> int:
    """Return the seconds of what means the same everywhere, or of numbers in `units`.

    Raises InvalidArgument, with the `formats` that the scheduler takes, for all else.
    """
    found = three_parts(time) or parts(time, units)
    if not found:
        raise no_time(time, formats)
    return found


def clock(seconds: int) -> str:
    """Return H:MM:SS, with two digits for hours at least."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def no_time(time: str, formats: str) -> InvalidArgument:
    """Return the error for a time limit that the scheduler would not take."""
    return InvalidArgument(f"time {time!r}: expected more than 0, as {formats}")


def of_array(states: Sequence[str]) -> State:
    """Return the state of a job array, by those of its jobs: what is to come counts first."""
    counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    first = next((s for s in ("running", "queued", "failed") if s in states), states[0])
    return State(first, "array", counted)


def inside(job: Job, options: list[str]) -> list[str]:
    """Return the words that start a program in the job's container, if any."""
    if job.container is None:
        return []
    for folder in (job.cwd, job.folder):
        if set(":,") & set(str(folder)):
            raise InvalidArgument(f"{folder}: a folder for a container has no ':' and no ','")
    binds = ["--bind", str(job.cwd), "--bind", str(job.folder)]
    return ["apptainer", "exec", *options, *binds, job.container]
