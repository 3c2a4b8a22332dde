"""Modules that run in ranks: how `mpidl bench` starts one, and how it hands its report back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import mpidl
from mpidl.cli import launcher
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.world import World

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run(module: str, ranks: int, **options: Any) -> dict[str, Any]:
    """Run `module` on `ranks` ranks of this machine, one thread each, and return its report.

    As `mpidl run` does it. `options` are what JSON can hold. Raises MpidlError with what the
    ranks said, where they fail, and MPINotFound.
    """
    library = launcher.find()
    program = launcher.program([module, json.dumps(options)], module=True)
    environment = {**launcher.clean_environment(), **launcher.environment(library, ranks)}
    result = subprocess.run(
        [*launcher.options(library, ranks), *program],
        env={**environment, **dict.fromkeys(THREADS, "1")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        said = result.stderr.strip() or result.stdout.strip()
        raise MpidlError(f"{module} failed on {ranks} ranks:\n{said}")
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def in_ranks(measure: Callable[..., dict[str, Any]]) -> None:
    """Be such a module: call `measure(world, **options)`, and print what rank 0 returns.

    The report is all that goes to standard output: libraries in C greet there, and the launcher
    may put the greeting of one rank into the middle of another one's line. Theirs go to standard
    error.
    """
    warnings.simplefilter("ignore")
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    world: World = mpidl.init()
    report = measure(world, **json.loads(sys.argv[1]))
    with os.fdopen(output, "w") as stdout:
        if world.rank == 0:
            print(json.dumps(report), file=stdout)
