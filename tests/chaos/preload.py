"""What processes that `warm` starts find imported, and known: the MPI that there is, its launcher.

To be imported by the process that they are forked from, before any of them.
"""

from __future__ import annotations

import os
from contextlib import suppress

from mpidl import config
from mpidl.checkpoint import saver
from mpidl.cli import app, launcher
from mpidl.errors import MPINotFound
from tests.chaos import train
from tests.conftest import MPI_LIBRARIES

__all__ = ["app", "saver", "train"]

os.environ.pop("MPI4PY_LIBMPI", None)  # what runs in such a process gets an environment of its own
with suppress(MPINotFound), config.setting("MPI4PY_LIBMPI", str(MPI_LIBRARIES["openmpi"])):
    found = launcher.query()
    launcher.query = lambda: found
