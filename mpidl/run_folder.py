"""The folder of a run: what was asked for, where it ran, and what came out, written by rank 0."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from mpidl.world import World


class RunFolder:
    """`config.json`, and `metrics.jsonl` with one line per epoch.

    The files of an earlier run in the same folder are kept, as `config.json.1` and so on.
    Collective: each rank tells its host, and if rank 0 cannot write, every rank raises.
    """

    def __init__(self, path: str | Path, world: World, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.writes = world.rank == 0
        hosts = world.gather(platform.node())
        with world.together():
            if self.writes:
                self._create({**settings, **_environment(world, hosts)})

    @classmethod
    def opened(cls, path: Path) -> RunFolder:
        """Return the folder that others have made, for a rank that came later. Not collective."""
        made = cls.__new__(cls)
        made.path, made.writes = path, False
        return made

    def _create(self, config: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "metrics.jsonl"):
                _set_aside(self.path / name)
            text = json.dumps(config, indent=2, default=_plain)
            (self.path / "config.json").write_text(text + "\n")
            (self.path / "metrics.jsonl").write_text("")
        except OSError as error:
            raise InvalidArgument(f"cannot write the run folder {self.path}: {error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, on rank 0."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record, default=_plain) + "\n")


def _set_aside(file: Path) -> None:
    if file.exists():
        number = next(n for n in count(1) if not Path(f"{file}.{n}").exists())
        file.rename(f"{file}.{number}")


def _environment(world: World, hosts: list[str]) -> dict[str, Any]:
    from mpidl import __version__

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "ranks": world.size,
        "nodes": world.nodes,
        "hosts": hosts,
        "mpi": world.MPI.Get_library_version().split("\n")[0].rstrip("\0 "),
        "versions": {
            "mpidl": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        # one level: what stands inside comes here too, with its own name
        return {type(value).__name__: {f.name: getattr(value, f.name) for f in fields(value)}}
    return str(value)
