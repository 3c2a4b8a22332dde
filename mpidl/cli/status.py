"""`mpidl status`: what the scheduler says of a job, and how far its training is."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpidl.cli import runs, schedulers
from mpidl.cli.schedulers.base import SchedulerFailed, State
from mpidl.cli.told import COLUMNS, complain

if TYPE_CHECKING:
    from mpidl.cli.runs import Record

LATE_SECONDS = 120  # without news of a run that is said to run
ENDS = {"finished": 0, "failed": 1, "unknown": 0}  # exit statuses of --watch


def status(
    job: Annotated[
        str | None,
        typer.Argument(metavar="[JOB|NAME|FOLDER]", help="Default: all runs in runs/."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="A line for each change, until the job ends.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
) -> None:
    """Show the state of a job, its step, loss, samples per second, and how often it was requeued.

    Example: mpidl status --watch train
    """
    if job is None:
        found = [_look(record) for record in runs.listed()]
        _show(found, as_json=as_json)
        return
    folder = runs.find(job)
    before = None
    while True:
        now = _of_folder(folder) if folder is not None else _of_job(job)
        if now is None:
            complain(f"no run folder and no job {job!r}")
            raise typer.Exit(2)
        ended = not watch or now["state"] in ENDS
        if as_json or before is None or ended:
            print(json.dumps(now) if as_json else _text(now), flush=True)
        elif (line := _line(now)) != before:
            print(_cut(f"{time.strftime('%H:%M:%S')}  {line}", COLUMNS), flush=True)
        if ended:
            raise typer.Exit(ENDS.get(now["state"], 0) if watch else 0)
        before = _line(now)
        time.sleep(every)


def _of_folder(folder: Path) -> dict[str, Any] | None:
    record = runs.read(folder)
    if record is not None:
        return _look(record)
    progress = runs.progress(folder)  # of a job script that was submitted by hand
    starts = runs.starts(folder)
    if progress is None and not starts:
        return None
    return {
        "folder": str(folder),
        "job": starts[-1] if starts else None,
        "state": (progress or {}).get("state", "unknown"),
        "requeues": max(0, len(starts) - 1),
        "progress": progress,
    }


def _of_job(job: str) -> dict[str, Any] | None:
    """Return what the scheduler here says of a job that has no run folder."""
    try:
        kind, system = schedulers.find(None)
        found = system.state(job)
    except (ValueError, SchedulerFailed):
        return None
    return {"job": job, "scheduler": kind, **asdict(found)}


def _look(record: Record) -> dict[str, Any]:
    found = runs.state(record) or State("unknown", "unknown", "the scheduler cannot be asked")
    progress = runs.progress(record.folder)
    state = found.state
    if state == "unknown" and (progress or {}).get("state") in ("finished", "failed"):
        state = (progress or {})["state"]
    told: dict[str, Any] = {
        "folder": str(record.folder),
        "job": record.job,
        "name": record.name,
        "scheduler": record.scheduler,
        "state": state,
        "word": found.word,
        "detail": found.detail,
        "submitted": record.submitted,
        "requeues": max(0, record.starts - 1),
        "progress": progress,
    }
    # of the jobs of an array, or of processes that each train alone (MPIDL_ALONE)
    folders = [path for path in record.folder.iterdir() if re.fullmatch("[0-9]+", path.name)]
    if folders or record.array is not None:
        folders.sort(key=lambda path: int(path.name))
        told["jobs"] = {path.name: runs.progress(path) for path in folders}
    return told


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
    elif not found:
        print("no runs in runs/; mpidl submit makes one")
    for one in [] if as_json else found:
        print(_short(one))


def _short(one: dict[str, Any]) -> str:
    progress = one["progress"] or {}
    step = f"step {progress['step']} of {progress['steps']}" if "step" in progress else ""
    name = Path(one["folder"]).name
    return _cut(f"{one['job']:<10} {one['state']:<8} {_cut(name, 36):<36} {step}".rstrip(), COLUMNS)


def _text(one: dict[str, Any]) -> str:
    """Return some lines of at most 80 columns."""
    word = one.get("word", "")
    of = f" ({word})" if word and word.lower() != one["state"] else ""
    lines = [f"job       {one['job']}, {one['state']}{of}"]
    if one.get("detail"):
        lines.append(f"          {one['detail']}")
    if "folder" in one:
        lines.append(f"run       {one['folder']}")
    if one.get("requeues"):
        lines.append(f"requeued  {one['requeues']} times" if one["requeues"] > 1 else
                     "requeued  once")  # fmt: skip
    lines += _progress(one.get("progress"), one["state"])
    for index, progress in one.get("jobs", {}).items():
        first = (_progress(progress) or ["          nothing yet"])[0]
        lines.append(f"{index:<9} {first[10:]}")
    return "\n".join(_cut(line, COLUMNS) for line in lines)


def _line(one: dict[str, Any]) -> str:
    """Return what changes while a job is watched."""
    requeued = f", requeued {one['requeues']}" if one.get("requeues") else ""
    lines = _progress(one.get("progress"))
    return f"{one['state']}{requeued}" + (f", {lines[0][10:]}" if lines else "")


def _progress(progress: dict[str, Any] | None, known: str = "") -> list[str]:
    if not progress:
        return []
    loss, rate = progress.get("loss"), progress["samples_per_second"]
    shown = f"{loss:.4f}" if isinstance(loss, float) else loss
    lines = [
        f"training  step {progress['step']} of {progress['steps']}, epoch {progress['epoch']} of "
        f"{progress['epochs']}, loss {shown}, {rate:,.0f} samples/s"
    ]
    since = time.time() - progress["time"]
    state = progress.get("state")
    if state not in ("running", known):
        lines.append(f"          {state}")
    elif state == "running" and since > LATE_SECONDS:
        lines.append(f"          no news for {since:,.0f} s")
    return lines


def _cut(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, its middle left out; it may be anybody's."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) <= width:
        return text
    return f"{text[: width // 2 - 2]}...{text[len(text) - (width - width // 2 - 1) :]}"
