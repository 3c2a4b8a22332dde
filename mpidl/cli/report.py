"""`mpidl report`: a page of figures and tables from run folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpidl.cli import runs
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.report.run import Run

if TYPE_CHECKING:
    from collections.abc import Sequence


def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="RUN [RUN2]...", help="Run folders, or names in runs/."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE")] = Path("report.html"),
) -> None:
    """Write one HTML page about a run, or about several side by side.

    Loss, metrics, throughput, time by phase and rank, batch size, scaling, configuration. The page
    needs no network, script or other file. Also while a run goes on.

    Example: mpidl report runs/a runs/b -o compare.html
    """
    try:
        from mpidl.report import page  # needs an extra

        page.check()
        found = opened(folders)
        if output.is_dir() or not output.absolute().parent.is_dir():
            raise InvalidArgument(f"-o {output}: expected a file in a folder that exists")
        text = page.page(found)
        new = output.with_name(f".{output.name}.{os.getpid()}.new")
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(output)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise MpidlError(f"cannot write {output}: {error.strerror}") from error
    except MpidlError as error:
        print(f"mpidl: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(output)


def opened(folders: Sequence[str]) -> list[Run]:
    """Return the runs in these folders, each with a name of its own.

    Raises InvalidArgument for what is no run folder.
    """
    paths = [runs.find(folder) or Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]).lstrip("/") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{i + 1}: {name}" for i, name in enumerate(names)]
    return [Run(path, name or None) for path, name in zip(paths, names, strict=True)]
