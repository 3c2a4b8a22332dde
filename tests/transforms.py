"""Data sets and transforms for the tests of the loader.

They have a module of their own, which imports little: every worker that gets one imports it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.data import ArrayDataset


def numbers(n: int, width: int = 3) -> ArrayDataset:
    """Return a data set whose targets are the numbers of its samples."""
    return ArrayDataset(np.arange(n * width, dtype=np.float64).reshape(n, width), np.arange(n))


def shift(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, *, by: float) -> Any:
    return x + by, y


def noisy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return x + rng.normal(size=x.shape), rng.permutation(y).astype(np.int16)


def growing(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
    """Each batch has another shape and dtype; some are in Fortran's order, or strided."""
    width = int(rng.integers(0, 2000))
    kind = rng.choice(["?", "u1", ">f4", "f8", "c16", "M8[s]"])
    wide = np.asfortranarray(rng.integers(0, 99, (len(x), width, 2)).astype(kind))
    return wide[:, :, 0], np.repeat(y, 2)[::2]


class Broken(Exception):
    """An error that arrives as it was raised."""


class Closed(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def fail(x: Any, y: Any, rng: Any, *, kind: type[Exception], at: int) -> Any:
    """Fail for the batch that begins with sample `at`, and for all behind it."""
    if y[0] >= at:
        raise kind(*["a broken leaf", "of a tree"][: 2 if kind is Closed else 1])
    return x, y


def leave(x: Any, y: Any, rng: Any) -> Any:
    sys.exit(0)


def kill_once(x: Any, y: Any, rng: Any, *, mark: Path, how: int) -> Any:
    """End the worker that gets batch 2, the first time; by exit status where `how` is negative."""
    if y[0] == 8 and not mark.exists():
        mark.touch()
        if how < 0:
            os._exit(-how)
        os.kill(os.getpid(), how)
    return x, y


def interrupt_once(x: Any, y: Any, rng: Any, *, mark: Path) -> Any:
    """Do to the rank what Ctrl-C does, while it waits for this batch."""
    if y[0] == 8 and not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    return x, y


def tell(x: Any, y: Any, rng: Any, *, path: Path) -> Any:
    """Write down what this process is like."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    facts = {
        "modules": sorted(sys.modules),
        "environment": dict(os.environ),
        "ignored": int(status["SigIgn"], 16),
        "blocked": int(status["SigBlk"], 16),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
        "maps": Path("/proc/self/maps").read_text(),
    }
    path.write_text(json.dumps(facts))
    return x, y


def import_mpi(x: Any, y: Any, rng: Any) -> Any:
    """As modules do that use mpi4py elsewhere: unasked, this import starts MPI."""
    from mpi4py import MPI

    assert not MPI.Is_initialized()
    return x, y


def start_mpi(x: Any, y: Any, rng: Any) -> Any:
    import mpidl

    mpidl.init()


class Counted:
    """Leaves a file for each shard that was taken."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n

    def __len__(self) -> int:
        return self.n

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (self.folder / str(indices[0])).touch()
        return indices[:, None], indices


def lengthy(text: str) -> Exception:
    return ValueError(text * 100_000)


class Opened(ArrayDataset):
    def __setstate__(self, state: dict) -> None:
        raise FileNotFoundError("a lost leaf")


def always(made: Any, *_: Any) -> Any:
    return made
