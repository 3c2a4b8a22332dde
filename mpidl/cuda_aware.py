"""Whether MPI may be given pointers to GPU memory: measured, once, by a process that may crash.

What a library says of itself is a hint: it knows how it was built, not what its transports do with
such a pointer here. The answer is kept in the user's cache folder, for each MPI library, driver,
host and setting.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidl import config, launched, mpi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.world import World

CHILD = (sys.executable, "-m", "mpidl.cuda_probe")
SECONDS = 60.0  # CuPy's import from a network's file system takes some
DRIVER = Path("/proc/driver/nvidia/version")
LATE = "no answer"
UNDECIDED = ("no GPU", "no MPI", LATE)  # tomorrow it may be another

_undecided: dict[tuple[str, ...], Answer] = {}  # of this process: not to be asked for again in it


@dataclass(frozen=True)
class Answer:
    """What was found, and how."""

    yes: bool
    why: str
    measured: bool = True

    def __str__(self) -> str:
        return f"{'yes' if self.yes else 'no'} ({self.why})"


def agreed(world: World) -> bool:
    """Return whether MPI takes GPU memory on every node. Collective; each node measures once."""
    mine = None
    with world.together():
        config.cuda_aware()  # a wrong value is told on every rank
        if world.local_rank == 0:
            mine = answer().yes
    with world.mark.enter("asking whether MPI is CUDA-aware"):
        found = world.comm.allgather(mine)
    return all(one is not False for one in found)


def answer(child: Sequence[str] = CHILD, seconds: float = SECONDS) -> Answer:
    """Return what MPIDL_CUDA_AWARE says, what is known from before, or what a child finds out."""
    asked = config.cuda_aware()
    if asked != "auto":
        return Answer(asked == "yes", f"MPIDL_CUDA_AWARE={asked}", measured=False)
    facts = key()
    path = _path(facts)
    known = None if path is None else _read(path, facts)
    if known is not None:
        return known
    trial = (*child, json.dumps(facts, sort_keys=True))
    if trial in _undecided:
        return _undecided[trial]
    found = measure(child, seconds)
    if path is None or found.why.partition(":")[0] in UNDECIDED:
        _undecided[trial] = found
    else:
        _write(path, {"of": facts, "answer": asdict(found)})
    return found


def measure(child: Sequence[str] = CHILD, seconds: float = SECONDS) -> Answer:
    """Let a process of its own send from GPU memory to GPU memory, and see what comes of it.

    It prints "yes", or "no GPU" and the like with a reason. It may also crash, or hang.
    """
    try:
        done = subprocess.run(
            [*child], env={**launched.without(), "MPIDL_ALONE": "1"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(False, f"{LATE}: a trial did not end within {seconds:.0f} s")
    except OSError as error:
        return Answer(False, f"no MPI: a trial could not start: {error}")
    said = next((line for line in done.stdout.splitlines() if line.startswith("mpidl: ")), "")
    verdict = said.removeprefix("mpidl: ")
    if done.returncode == 0 and verdict == "yes":
        return Answer(True, "a trial sent from GPU memory")
    if done.returncode == 0 and verdict:
        return Answer(False, verdict)
    if done.returncode < 0:
        return Answer(False, f"a trial died of {signal.Signals(-done.returncode).name}")
    lines = done.stderr.strip().splitlines() or [""]
    return Answer(False, f"a trial failed with status {done.returncode}: {lines[-1][:200]}")


def hint() -> str:
    """Return what the library says of itself: "yes", "no", or "nothing"."""
    return {"unknown": "nothing"}.get(said := mpi.says_cuda_aware(), said)


def key() -> dict[str, Any]:
    """Return all that the answer depends on. Starts no MPI."""
    MPI = mpi.load()
    return {
        "library": MPI.Get_library_version(),
        "path": mpi.library_path(),
        "driver": DRIVER.read_text() if DRIVER.exists() else None,
        "host": platform.node(),
        "settings": config.transports(),
    }


def _path(facts: dict[str, Any]) -> Path | None:
    """Return where the answer is kept; None where there is no place for it."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = config.cache_folder()
    return None if folder is None else folder / f"cuda-aware-{digest}.json"


def _read(path: Path, facts: dict[str, Any]) -> Answer | None:
    """Return a kept answer; None where there is none, it is another's or damaged."""
    try:
        if path.stat().st_uid != os.getuid():
            return None
        kept = json.loads(path.read_text())
        if kept["of"] != facts:
            return None
        found = Answer(**kept["answer"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found.yes, bool) and isinstance(found.why, str) else None


def _write(path: Path, what: dict[str, Any]) -> None:
    """Keep an answer: whole, or not at all. Ranks may write the same at once."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(what, indent=1))
        Path(file.name).replace(path)
    except OSError:
        return  # a full or read-only home: it is measured again
