"""The hosts of a run: which there are, which of them answer, and what is to be done on each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, final

from mpidl.cli import launcher

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpidl.cli.launcher import Library

MEMORY = Path("/dev/shm")  # where elastic runs keep snapshots, in folders mpidl-RUN-...
ASK_SECONDS = 5.0  # for SLURM's commands
SWEEPS = 20


def down_in_slurm(names: Iterable[str]) -> set[str]:
    """Return those hosts that SLURM knows to be down, or not to answer."""
    if not os.environ.get("SLURM_JOB_NODELIST"):
        return set()
    lines = _ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %t")
    states = [line.split() for line in lines]
    return {s[0] for s in states if len(s) == 2 and (s[1].startswith("down") or s[1][-1] == "*")}


def _ask(*line: str) -> list[str]:
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def is_here(name: str) -> bool:
    """Return whether a host's name is this one's."""
    own = socket.gethostname()
    short = {own, own.split(".")[0]}
    return name in ("localhost", "127.0.0.1") or name in short or name.split(".")[0] in short


def addresses(hosts: Iterable[str]) -> list[str]:
    """Return the addresses of this host from which the others are reached. Nothing is sent."""
    found: dict[str, None] = {}
    for name in hosts:
        with suppress(OSError):
            for family, kind, _, _, address in socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM):
                with suppress(OSError), socket.socket(family, kind) as link:
                    link.connect(address)
                    found[link.getsockname()[0].split("%")[0]] = None
    others = [address for address in found if not address.startswith(("127.", "::1"))]
    return others or list(found) or ["127.0.0.1"]


def host_of(told: str, address: str, hosts: Iterable[str]) -> str | None:
    """Return which of the hosts it is that calls itself `told`, and has this address."""
    names = list(hosts)
    for name in names:
        if told == name or told.split(".")[0] == name.split(".")[0]:
            return name
    for name in names:
        with suppress(OSError):
            if address in {found[4][0] for found in socket.getaddrinfo(name, None)}:
                return name
    return None


@final
class Errand:
    """A short command on each of several other hosts at once, brought there by the launcher.

    So a host answers where the launcher can start a rank there. What takes longer than `end`, on
    the caller's clock, is killed.
    """

    def __init__(
        self, library: Library, hosts: Iterable[str], command: Sequence[str], end: float
    ) -> None:
        self.end = end
        self.answered: set[str] = set()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in hosts:
            places = {name: 1}
            line = [*launcher.options(library, 1, places), *command]
            self._running[name] = subprocess.Popen(
                line,
                env={**launcher.clean_environment(), **launcher.environment(library, 1, places)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def done(self, now: float) -> bool:
        """Return whether all have answered, or have had their time."""
        for name, process in list(self._running.items()):
            if process.poll() is None and now < self.end:
                continue
            if process.returncode == 0:
                self.answered.add(name)
            del self._running[name]
            kill(process)
        return not self._running

    def stop(self) -> None:
        """Wait no longer."""
        self.done(float("inf"))


def family(process: subprocess.Popen[bytes]) -> set[tuple[int, str]]:
    """Return what descends from a process, or is of the session that it leads; without itself.

    By number and start, since numbers come again.
    """
    parents: dict[tuple[int, str], int] = {}
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may have ended
            words = place.read_text().rpartition(")")[2].split()  # of proc_pid_stat(5), from 3 on
            one = int(place.parent.name), words[19]
            if words[0] not in "ZX":
                parents[one] = int(words[1])
                if int(words[3]) == process.pid:
                    found.add(one)
    known = {process.pid} if process.poll() is None else set()
    while more := {one for one in parents if parents[one] in known and one[0] not in known}:
        found |= more
        known |= {pid for pid, _ in more}
    return {one for one in found if one[0] != process.pid}


def kill(process: subprocess.Popen[bytes], before: set[tuple[int, str]] | None = None) -> None:
    """Kill a process with its family, also as it was `before`: MPICH's leaves the session."""
    before = before or set()
    for _ in range(SWEEPS):
        found = family(process) | {one for one in before if runs(*one)}
        with suppress(ProcessLookupError):
            process.kill()
        for pid, _ in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if not found:
            break


def runs(pid: int, start: str | None = None) -> bool:
    """Return whether there is such a process here, which has not ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0] not in "ZX" and start in (None, words[19])
    except (OSError, IndexError):
        return False


def remove_snapshots(run: str) -> None:
    """Remove what a run has left in this host's memory."""
    for folder in MEMORY.glob(f"mpidl-{run}-*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def removing_snapshots(run: str) -> list[str]:
    """Return the command that does it on another host."""
    return ["/bin/sh", "-c", f"rm -rf {MEMORY}/mpidl-{run}-*"]
