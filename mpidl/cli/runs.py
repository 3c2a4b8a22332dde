"""Run folders, as `mpidl submit` makes them and `mpidl status` reads them."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpidl.cli.schedulers import SCHEDULERS, State
from mpidl.cli.schedulers.base import SchedulerFailed

FOLDER = Path("runs")  # below where jobs are submitted
RECORD = "job.json"  # what was submitted
LOG = "jobs.log"  # one line for each start, by the job script
ID = re.compile(r"[^\W_][\w.\[\]-]*")  # of a job: 123, 123[].server, f2xyz


@dataclass(frozen=True)
class Record:
    """A job that was submitted, as it is now."""

    folder: Path
    job: str  #: its id, which is another one where a scheduler starts it again as a new job
    scheduler: str
    name: str
    submitted: str
    array: str | None
    starts: int  #: how often one was started


def read(folder: Path) -> Record | None:
    """Return what was submitted in the folder of a run; None where nothing can be read."""
    given = _json(folder / RECORD)
    if given is None or given.get("scheduler") not in SCHEDULERS:
        return None
    job = str(given.get("job"))
    if not ID.fullmatch(job):  # it becomes an argument of the scheduler's commands
        return None
    submitted = str(given.get("submitted", ""))
    for line in _lines(folder / LOG):
        when, _, rest = line.partition(" ")
        what, _, number = rest.partition(" ")
        # where an earlier job had this folder, its lines are older
        if what == "queued" and ID.fullmatch(number) and when[:19] >= submitted[:19]:
            job = number if given.get("array") is None else job
    name, array = str(given.get("name", "")), given.get("array")
    return Record(folder, job, given["scheduler"], name, submitted, array, len(starts(folder)))


def state(record: Record) -> State | None:
    """Ask the scheduler for a job; None where it cannot be asked."""
    try:
        return SCHEDULERS[record.scheduler].state(record.job)
    except SchedulerFailed:
        return None


def progress(folder: Path) -> dict[str, Any] | None:
    """Return what the `Trainer` of a run wrote last: see `mpidl.run_folder`."""
    found = _json(folder / "state.json") or {}
    numbers = ("time", "step", "steps", "epoch", "epochs", "samples_per_second")
    return found if all(isinstance(found.get(name), (int, float)) for name in numbers) else None


def starts(folder: Path) -> list[str]:
    """Return the ids of the jobs that were started for a run."""
    found = (line.split() for line in _lines(folder / LOG))
    return [words[2] for words in found if words[1:2] == ["started"] and len(words) == 3]


def find(text: str) -> Path | None:
    """Return the run folder that `text` names.

    It is a path, a folder's name in runs/, a job's id, or a job's name: then the newest.
    """
    for path in (Path(text), FOLDER / text):
        if path.is_dir():
            return path
    for record in listed():
        first = (_json(record.folder / RECORD) or {}).get("job", "")
        if text in (
            record.name,
            record.job,
            first,
            record.job.split(".")[0],
            str(first).split(".")[0],
        ):
            return record.folder
    return None


def listed() -> list[Record]:
    """Return the runs in runs/, the newest first."""
    folders = FOLDER.iterdir() if FOLDER.is_dir() else ()
    found = [record for folder in folders if (record := read(folder)) is not None]
    return sorted(found, key=lambda record: record.submitted, reverse=True)


def write(path: Path, text: str, mode: int) -> None:
    """Write a file for nobody else, at once or not at all."""
    new = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(number, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    new.replace(path)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
