"""Runs a script with the faults that MPIDL_FAULTS asks for: `python -m mpidl.testing SCRIPT ...`.

They happen to every `DataParallel` of it, that of a `Trainer` too.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn

from mpidl.errors import InvalidArgument
from mpidl.testing import faults_from_environment, inject


def main() -> None:
    """Run the script named by the first argument; the others are its own."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m mpidl.testing SCRIPT [ARGUMENTS]...")
    script = sys.argv[1]
    if not Path(script).is_file():
        _refuse(f"no such script: {script}")
    try:
        plan = faults_from_environment()
    except InvalidArgument as error:
        _refuse(f"MPIDL_FAULTS: {str(error).removeprefix('faults: ')}")
    sys.argv, sys.path[0] = sys.argv[1:], str(Path(script).resolve().parent)
    with inject(None, *plan.faults, seed=plan.seed, record=plan.record):
        runpy.run_path(script, run_name="__main__")


def _refuse(problem: str) -> NoReturn:
    print(f"mpidl.testing: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
