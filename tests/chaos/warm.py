"""Processes that start at once: forked from one that has imported what a run needs.

Imports take longer than many a training: of `mpidl run`, and of the same training on one rank.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl.cli.attend import PR_SET_PDEATHSIG

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.preload"])


def start(
    function: Callable[..., None], *arguments: Any, output: Path, environment: dict[str, str]
) -> BaseProcess:
    """Call a module's function in a new session; what it prints is added to the file `output`."""
    process = _context.Process(target=_begin, args=(function, arguments, output, environment))
    process.start()
    return process


def _begin(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    output: Path,
    environment: dict[str, str],
) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # as where the tests are killed
    os.environ.clear()
    os.environ.update(environment)
    with output.open("ab") as file, Path(os.devnull).open("rb") as nothing:
        for stream, number in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), number)
    function(*arguments)
