"""`mpidl bench`: one command for each benchmark."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mpidl.bench import engine as engine_bench

app = typer.Typer(no_args_is_help=True, help="Measure mpidl against others, in one run, in turns.")


@app.callback()
def _main() -> None:
    """Keep the names of the benchmarks, also while there is only one."""


@app.command()
def engine(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    turns: Annotated[int, typer.Option(min=1, help="Steps of each, taken in turns.")] = 25,
) -> None:
    """Compare the built-in engine with PyTorch eager (if installed), both on one thread.

    Step time of three models (medians), peak memory, and the time of an operation on 10 elements.
    """
    report = engine_bench.run(turns)
    if as_json:
        print(json.dumps(report))
    else:
        engine_bench.show(report)
