"""What figures depend on besides the code: said beside them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpidl
from mpidl import cores, mpi

if TYPE_CHECKING:
    from mpidl.world import World

SETTINGS = ("GLOO_", "OMPI_MCA_mpi_", "OMPI_MCA_osc", "OMP_", "OPENBLAS_")  # names begin so
PACKAGES = ("mpi4py", "torch", "horovod")


def facts(world: World) -> dict[str, Any]:
    """Return cores, libraries and settings, as JSON holds them. Not collective."""
    return {
        "processor": _processor(),
        "cores": cores.available(),
        "nodes": world.nodes,
        "python": platform.python_version(),
        "mpidl": mpidl.__version__,
        "numpy": np.__version__,
        "mpi": mpi.short_version(world.MPI.Get_library_version()),
        **{name: _version(name) for name in PACKAGES},
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
