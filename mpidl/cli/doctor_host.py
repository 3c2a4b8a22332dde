"""Run by `mpidl doctor --hosts` on each host: what is there. Starts no MPI. Prints JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import mpidl
from mpidl import cores, mpi
from mpidl.errors import MpidlError

PACKAGES = ("numpy", "mpi4py", "torch", "jax", "keras", "tensorflow", "tensorflow-cpu", "horovod",
            "cupy", "cupy-cuda12x", "cupy-cuda13x")  # fmt: skip
MEMORY = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
NET, RDMA = Path("/sys/class/net"), Path("/sys/class/infiniband")


def facts() -> dict[str, Any]:
    """Return what is there, as JSON holds it. Sizes in bytes, speeds in bits a second."""
    told: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "mpidl": mpidl.__version__,
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "mpi": None,
        "cores": cores.available(),
        "shared_memory": _shared_memory(),
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_memory": _limit(resource.RLIMIT_MEMLOCK),
        "interfaces": _speeds(),
        "rdma": sorted(device.name for device in RDMA.glob("*")),
        "gpus": None,
    }
    with suppress(MpidlError):
        told["mpi"] = mpi.short_version(mpi.load().Get_library_version())
    if DRIVER.exists():
        try:
            told["gpus"] = gpus(importlib.import_module("cupy"))
        except Exception as error:  # CuPy's own class lives in the module that may be broken
            told["gpus"] = f"{type(error).__name__}: {error}"
    return told


def gpus(cupy: Any) -> dict[str, Any]:
    """Return the names of the GPUs, and the pairs of which one cannot read the other's memory."""
    runtime = cupy.cuda.runtime
    every = range(runtime.getDeviceCount())
    names = [runtime.getDeviceProperties(i)["name"].decode() for i in every]
    pairs = [(i, j) for i in every for j in every if i < j]
    return {
        "names": names,
        "apart": [[i, j] for i, j in pairs if not runtime.deviceCanAccessPeer(i, j)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shared_memory() -> dict[str, int] | None:
    try:
        found = os.statvfs(MEMORY)
    except OSError:
        return None
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def _limit(kind: int) -> int | None:
    """Return a limit that holds for this process; None for no limit."""
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _speeds() -> dict[str, float]:
    """Return the speed of each network interface that has a link, and tells it."""
    found = {}
    for folder in NET.glob("*"):
        with suppress(OSError, ValueError):  # a bridge, and one without a link, tells none
            megabits = int((folder / "speed").read_text())
            if megabits > 0 and (folder / "device").exists():
                found[folder.name] = megabits * 1e6
    return found


if __name__ == "__main__":
    print(json.dumps(facts()))
