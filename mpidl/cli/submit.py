"""`mpidl submit`: a job script from a template of launch/, checked, written and submitted."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpidl.cli import clusters, copy, runs, schedulers
from mpidl.cli.job import Job, quote
from mpidl.cli.told import complain
from mpidl.errors import InvalidArgument, MpidlError

if TYPE_CHECKING:
    from mpidl.cli.clusters import Profile
    from mpidl.cli.schedulers import Scheduler

OWN = ("--nodes", "--ranks-per-node", "--gpus-per-node", "--cpus-per-rank", "--dry-run")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
PLACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+,/-]*")  # of an account or a partition
TIME = "1:00:00"


def submit(
    command: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...")],
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as GPUs, or 1.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, help="Cores of a rank. Default: 1.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="Each rank sees one. Default: 0.")
    ] = None,
    time: Annotated[
        str, typer.Option(help=f"The time limit, such as 2:00:00. Default: {TIME}.")
    ] = "",
    profile: Annotated[
        str, typer.Option(help="The cluster: a name out of launch/clusters, or a TOML file.")
    ] = "",
    scheduler: Annotated[
        str, typer.Option(help="slurm, pbs, lsf, flux or kubernetes. Default: what is here.")
    ] = "",
    name: Annotated[str, typer.Option(help="Of the job. Default: that of the script.")] = "",
    array: Annotated[
        str, typer.Option(metavar="0-9", help="Many jobs; {index} in ARGS is that of each.")
    ] = "",
    container: Annotated[
        str, typer.Option(metavar="IMAGE", help="Of Apptainer, or of Kubernetes.")
    ] = "",
    account: Annotated[str, typer.Option(help="Who pays.")] = "",
    partition: Annotated[str, typer.Option(help="Or queue.")] = "",
    run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on in this folder. Default: runs/NAME-TIME."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="One more directive, such as --constraint=a100; may be repeated."),
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the job script.")] = False,
) -> None:
    """Write a job script, show it and submit it.

    The job has the folder runs/NAME-TIME: its script, its output, and what a Trainer writes, which
    goes on from there when the time limit ends the job and it is queued again.

    Example: mpidl submit --nodes 4 --gpus-per-node 8 --time 2:00:00 train.py --lr 0.1
    """
    try:
        site = clusters.load(profile) if profile else clusters.Profile()
        kind, system = schedulers.find(scheduler or site.scheduler)
        words, label = _program(command, site, kind, container or site.container, module=module)
        folder = (run or _new_folder(name or label)).expanduser().absolute()
        gpus = _first(gpus_per_node, site.gpus_per_node, 0)
        ranks = _first(ranks_per_node, site.ranks_per_node, gpus or 1)
        cpus = _first(cpus_per_rank, site.cpus_per_rank, 1)
        seconds = system.seconds(time or site.time or TIME)
        job = Job(
            name=name or label,
            folder=folder,
            cwd=Path.cwd(),
            command=words,
            nodes=nodes,
            ranks_per_node=ranks,
            cpus_per_rank=cpus,
            gpus_per_node=gpus,
            seconds=seconds,
            stop_seconds=max(1, min(site.stop_seconds, seconds // 4)),
            array=array or None,
            account=account or site.account,
            partition=partition or site.partition,
            container=container or site.container,
            launcher=_launcher(site, nodes, ranks, cpus, gpus),
            environment=_environment(site, kind),
            options=(*site.directives, *(option or ())),
        )
        check(job, kind, system)
        text = system.render(job, copy.root() / "launch")
        print(text, end="")
        for note in advice(job):
            complain(note)
        if not dry_run:
            _hand_over(job, kind, system, text)
    except MpidlError as error:
        complain(error)
        status = 2 if isinstance(error, InvalidArgument) else 1
        raise typer.Exit(status) from None


def check(job: Job, kind: str, system: Scheduler) -> None:
    """Raise InvalidArgument for what cannot be, or could be taken for something else."""
    if not NAME.fullmatch(job.name):
        raise InvalidArgument(
            f"name {job.name!r}: expected at most 64 letters, digits, '_', '.' and '-', beginning "
            "with a letter or digit"
        )
    for what in ("account", "partition"):
        value = getattr(job, what)
        if value is not None and not PLACE.fullmatch(value):
            raise InvalidArgument(f"{what} {value!r}: expected letters, digits and _ . : @ + , / -")
    for option in job.options:
        if not clusters.one_line("option", option).startswith("-"):
            raise InvalidArgument(f"option {option!r}: expected such as --constraint=a100")
    if job.container is not None:
        clusters.one_line("container", job.container)
        if job.container.startswith("-"):
            raise InvalidArgument(f"container {job.container!r}: expected an image")
        if kind != "kubernetes" and "://" not in job.container and not Path(job.container).exists():
            raise InvalidArgument(f"no such container: {job.container}")
    if not job.gpus_per_node and asks_for_gpus(job.command):
        raise InvalidArgument(
            "--device cuda among the arguments, and no GPUs: expected --gpus-per-node with it"
        )
    if job.folder.exists() and not job.folder.is_dir():
        raise InvalidArgument(f"run {job.folder}: expected a folder")
    if job.folder.is_dir():
        if job.folder.stat().st_mode & stat.S_IWOTH:
            raise InvalidArgument(f"run {job.folder}: everybody can write there; chmod o-w first")
        _check_not_active(job.folder)
    system.check(job)


def asks_for_gpus(words: tuple[str, ...]) -> bool:
    """Whether the program is told to compute on a GPU."""
    pairs = zip(words, (*words[1:], ""), strict=True)
    return any(re.match(r"--device[= ]cuda", f"{a} {b}") for a, b in pairs)


def advice(job: Job) -> list[str]:
    """Return what is possible, and seldom meant."""
    found = []
    if job.gpus_per_node and job.ranks_per_node > job.gpus_per_node:
        found.append(
            f"{job.ranks_per_node} ranks and {job.gpus_per_node} GPUs on a node: some share one"
        )
    if job.gpus_per_node > job.ranks_per_node:
        unused = job.gpus_per_node - job.ranks_per_node
        found.append(f"a rank sees one GPU: {unused} on each node will be idle")
    if job.stop_seconds < 30:
        found.append(f"the ranks have {job.stop_seconds} s for a checkpoint before the time limit")
    return found


def _program(
    command: list[str], site: Profile, kind: str, container: str | None, *, module: bool
) -> tuple[tuple[str, ...], str]:
    """Return the full command of one rank, and a name for it. Raises InvalidArgument."""
    name, arguments = command[0], command[1:]
    if name.startswith("-"):
        raise InvalidArgument(f"{name} is no option of mpidl submit")
    own = next((word for word in arguments if word.split("=")[0] in OWN), None)
    if own is not None and "--" not in arguments[: arguments.index(own)]:
        raise InvalidArgument(
            f"{own} stands after the script, and would be an argument of it; options of mpidl "
            f"submit stand before it (for an argument: {quote(name)} -- {own})"
        )
    if "--" in arguments:
        arguments.remove("--")
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.split("/")[-1].removesuffix(".py")).lstrip("._-")
    label = (clean or "job")[:40]
    inside = container is not None  # paths are those of the image
    python = [site.python or ("python3" if inside else sys.executable), "-m", "mpi4py"]
    if module:
        return (*python, "-m", name, *arguments), label
    if name.endswith(".py"):
        if kind != "kubernetes" and not Path(name).is_file():
            raise InvalidArgument(f"no such script: {name}")
        # python would take it for an option, or mpi4py for the end of options
        path = name if name[0] not in "-+" else f"./{name}"
        return (*python, path, *arguments), label
    program = name if inside else shutil.which(name)
    if program is None:
        raise InvalidArgument(f"no such program: {name}")
    return (program, *arguments), label


def _launcher(
    site: Profile, nodes: int, ranks_per_node: int, cpus: int, gpus: int
) -> tuple[str, ...] | None:
    if site.launcher is None:
        return None
    numbers = {
        "{ranks}": nodes * ranks_per_node,
        "{nodes}": nodes,
        "{ranks_per_node}": ranks_per_node,
        "{cpus_per_rank}": cpus,
        "{gpus_per_node}": gpus,
    }
    pattern = re.compile("|".join(map(re.escape, numbers)))
    return tuple(pattern.sub(lambda m: str(numbers[m[0]]), word) for word in site.launcher)


def _environment(site: Profile, kind: str) -> tuple[str, ...]:
    """Return the lines of shell that make the environment of a job."""
    lines = []
    if site.modules or site.setup:
        lines.append("set +u  # they use variables that are not set")
        lines += [f"module load {quote(word)}" for word in site.modules]
        lines += [*site.setup, "set -u"]
    lines += [f"export {name}={quote(value)}" for name, value in site.environment]
    in_one = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    if site.python is None and kind != "kubernetes" and in_one:
        # with the launcher, and mpidl itself
        lines.append(f"export PATH={quote(str(Path(sys.executable).parent))}:$PATH")
    return tuple(lines)


def _new_folder(name: str) -> Path:
    stamp = datetime.now(timezone.utc).astimezone().strftime("%Y%m%d-%H%M%S")
    path = runs.FOLDER / f"{name}-{stamp}"
    tries = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(path for path in tries if not path.exists())


def _check_not_active(folder: Path) -> None:
    """Raise InvalidArgument where a job of this folder waits or runs."""
    record = runs.read(folder)
    if record is None:
        return
    now = runs.state(record)
    if now is not None and now.active:
        raise InvalidArgument(f"run {folder}: its job {record.job} is {now.state}")


def _hand_over(job: Job, kind: str, system: Scheduler, text: str) -> None:
    """Write the script, submit it, and note the job's id."""
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        job.folder.mkdir(mode=0o700, exist_ok=True)
        script = job.folder / system.script
        runs.write(script, text, mode=0o700)
        job_id = system.submit(job.folder)
        print(f"job {job_id}", flush=True)
        record = {
            "job": job_id,
            "scheduler": kind,
            "name": job.name,
            "submitted": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": list(job.command),
            "cwd": str(job.cwd),
            "nodes": job.nodes,
            "ranks": job.ranks,
            "seconds": job.seconds,
            "array": job.array,
        }
        runs.write(job.folder / runs.RECORD, json.dumps(record, indent=2) + "\n", mode=0o600)
    except OSError as error:
        raise InvalidArgument(f"cannot write the run folder {job.folder}: {error}") from error
    shown = os.path.relpath(job.folder)
    print(f"follow it: mpidl status --watch {quote(shown)}", file=sys.stderr)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
