"""What processes that `warm` starts find imported, and known: the MPI that there is, its launcher.

To be imported by the process that they are forked from, before any of them.
"""

from __future__ import annotations

import os
from contextlib import suppress

import mpidl.checkpoint.saver
import mpidl.cli.app
import tests.chaos.train
from mpidl import config
from mpidl.cli import launcher
from mpidl.errors import MPINotFound
from tests.conftest import MPI_LIBRARIES

os.environ.pop("MPI4PY_LIBMPI", None)
with suppress(MPINotFound), config.setting("MPI4PY_LIBMPI", str(MPI_LIBRARIES["openmpi"])):
    found = launcher.query()
    launcher.query = lambda: found
