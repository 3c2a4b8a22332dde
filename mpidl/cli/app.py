"""The commands and their options. What they do stands in the file of the same name."""

from __future__ import annotations

import io
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mpidl import __version__, config
from mpidl.cli import allocation, attend, bench, launcher, starters
from mpidl.cli import copy as copying
from mpidl.cli import doctor as checking
from mpidl.cli import plan as planning
from mpidl.cli import report as reporting
from mpidl.cli import status as following
from mpidl.cli import submit as submission
from mpidl.cli import trace as tracing
from mpidl.cli import watch as watching
from mpidl.cli.told import complain
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Data-parallel training over MPI.",
)
app.add_typer(bench.app, name="bench")
app.command()(planning.plan)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(
    submission.submit
)
app.command()(following.status)
app.command()(reporting.report)
app.command()(watching.watch)
app.add_typer(tracing.app, name="trace")


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    if version:
        print(__version__)
        raise typer.Exit


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...")],
    ranks: Annotated[
        int | None,
        typer.Option(
            "-n",
            "-np",
            "--ranks",
            min=1,
            help="Number of ranks. Default: those that the "
            "scheduler's job was asked for; 1 outside of one.",
            show_default=False,
        ),
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")
    ] = False,
    launcher_args: Annotated[
        str, typer.Option(help="More options for the launcher, in one string: '--timeout 600'.")
    ] = "",
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Go on when a rank is killed: Trainer(elastic=True).")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="With --elastic: spawn new ranks for those killed.")
    ] = False,
    hosts: Annotated[
        str,
        typer.Option(metavar="a:4,b:4", help="Run on these hosts, with so many ranks on each."),
    ] = "",
    launcher_name: Annotated[
        starters.Name | None,
        typer.Option(
            "--launcher",
            help="What starts the ranks. Default: the MPI's own; in Flux flux; in a job the "
            "scheduler's where the MPI has none.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus-per-rank", min=0, help="For srun, flux and jsrun: they hand out GPUs."
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Start again when ranks or hosts die, at most so often, on the hosts that are "
            "left. The script goes on from its checkpoints: Trainer(checkpoint=...).",
        ),
    ] = None,
    min_ranks: Annotated[
        int | None,
        typer.Option(min=1, help="With --elastic, --restarts: give up where fewer are left."),
    ] = None,
    bind: Annotated[
        str, typer.Option(metavar="cores|none", help="Give each rank cores of its own.")
    ] = "",
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Record where the time goes, on all ranks, in trace.json (docs/trace.md).",
        ),
    ] = False,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="--trace, into this file; FILE.json.gz is compressed. Default: trace.json, in a "
            "job in the folder MPIDL_OUT. A word after --trace would be the script.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no summary of a Trainer.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the command, do not run it.")] = False,
) -> None:
    """Run a script on several ranks, with the launcher of the MPI that Python loads.

    SCRIPT is a Python file, or any other program. A convenience: mpirun, mpiexec and srun
    work just as well; but they end where a host dies.

    Example: mpidl run -n 4 train.py --lr 0.1

    Inside a job of SLURM, PBS, LSF or Flux, on its hosts: mpidl run train.py

    mpidl run --trace -n 4 train.py

    mpidl run --launcher srun --dry-run train.py

    mpidl run --hosts a:4,b:4 train.py

    mpidl run --hosts a:4,b:4 --restarts 3 --min-ranks 4 train.py
    """
    if (replace and not elastic) or (min_ranks and not elastic and restarts is None):
        complain("--replace needs --elastic; --min-ranks that or --restarts")
        raise typer.Exit(2)
    library = _or_exit(starters.find)
    program = _or_exit(partial(launcher.program, command, module=module))
    chosen = _or_exit(partial(allocation.choose, ranks, hosts))
    for_own = "--elastic" if elastic else "--restarts" if restarts is not None else None
    asked = launcher_name.value if launcher_name else None
    starter = _or_exit(partial(starters.choose, library, chosen, asked, for_own))
    settings = launcher.replacing(min_ranks, replace=replace)
    if quiet:
        settings["MPIDL_QUIET"] = "1"
    if bind:
        settings["MPIDL_BIND"] = _or_exit(partial(config.bind, bind))
    if trace or trace_file is not None:
        settings |= _or_exit(partial(tracing.settings, trace_file))
    environment = {**starter.environment(chosen), **settings}
    names = [*os.environ, *environment]
    options = _or_exit(
        partial(starter.options, chosen, names, elastic=elastic, replace=replace, gpus=gpus)
    )
    extra = _or_exit(partial(launcher.split, launcher_args))
    line = [*options, *extra, *program]
    if dry_run:
        changes = [f"{name}={value}" for name, value in environment.items()]
        print(shlex.join(["env", *changes, *line] if changes else line))
        return
    if restarts is not None:
        from mpidl.cli import supervise

        job = supervise.Job(
            starter.library,
            program,
            chosen.ranks,
            restarts,
            chosen.hosts,
            min_ranks or 1,
            elastic,
            replace,
            extra,
            settings,
            chosen.cores,
        )
        status = _or_exit(partial(supervise.run, job))
        tracing.finish(settings)
        raise typer.Exit(status)
    sys.stdout.flush()
    if starter.own and library.vendor == "openmpi":
        with attend.status_file() as (path, told):
            environment["MPIDL_STATUS_FILE"] = path
            status = attend.run(line, {**os.environ, **environment}) or told()
            tracing.finish(settings)
            raise typer.Exit(status)
    # The launcher takes this process's place: its exit status and Ctrl-C need no one between.
    os.execve(line[0], line, {**os.environ, **environment})


@app.command()
def doctor(
    hosts: Annotated[
        str, typer.Option(metavar="a,b", help="Also these hosts, and the network between them.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which MPI, launcher, cores and GPUs there are, and what is missing.

    Example: mpidl doctor --json

    mpidl doctor --hosts a,b,c
    """
    names = list(_or_exit(partial(launcher.parse_hosts, hosts))) if hosts else []
    report = checking.examine()
    found = None
    if names:
        from mpidl.cli import doctor_hosts

        found = doctor_hosts.examine(names)
    checking.show(report, as_json=as_json, found=found)
    raise typer.Exit(0 if report.healthy and not (found and found.told("problem")) else 1)


@app.command()
def copy(
    names: Annotated[
        list[str] | None, typer.Argument(help="Such as examples, or launch/slurm_cpu.sbatch.")
    ] = None,
    to: Annotated[Path, typer.Option(help="The folder that gets them.")] = Path(),
) -> None:
    """Copy the examples and launch templates that come with mpidl; list them without a name.

    Example: mpidl copy examples launch/slurm_cpu.sbatch --to mine
    """
    if not names:
        print("\n".join(copying.available()))
        return
    for name in names:
        for path in _or_exit(partial(copying.copy, name, to)):
            print(path)


def _or_exit(function: Callable[[], T]) -> T:
    """Turn an error of ours into a message and exit status 2."""
    try:
        return function()
    except MpidlError as error:
        complain(error)
        raise typer.Exit(2) from None
