"""The folder of a run: what was asked for, where it runs, and what comes out, written by rank 0."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import config
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from mpidl.data import Batches
    from mpidl.progress import Progress
    from mpidl.trainer import Trainer
    from mpidl.world import World

STATE_SECONDS = 3.0  # between two states of a run for those that follow it


class RunFolder:
    """`config.json`, `metrics.jsonl` with one line per epoch, and `state.json`: how far it is.

    The files of an earlier run in the same folder are kept, as `config.json.1` and so on.
    Collective: each rank tells its host, and if rank 0 cannot write, every rank raises.
    """

    #: Each gets what `write` is given, on the rank that writes.
    listeners: Sequence[Callable[[dict[str, Any]], None]] = ()

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

    def _create(self, settings: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "metrics.jsonl"):
                _set_aside(self.path / name)
            text = json.dumps(settings, indent=2, default=_plain)
            (self.path / "config.json").write_text(text + "\n")
            (self.path / "metrics.jsonl").write_text("")
        except OSError as error:
            raise InvalidArgument(f"cannot write the run folder {self.path}: {error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, on rank 0."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record, default=_plain) + "\n")
            for listener in self.listeners:
                listener(record)

    def follow(self, shown: Progress, trainer: Trainer, ahead: list[Batches]) -> Progress:
        """Return `shown`, on rank 0 also written to state.json, for the epochs `ahead`."""
        return _Followed(self.path, shown, trainer, ahead) if self.writes else shown


class _Followed:
    """Keeps state.json: written at the first step, every few seconds, and at the end.

    Nothing is sent for it: the loss is the mean of this rank's samples of the epoch, so far.
    """

    def __init__(
        self, folder: Path, shown: Progress, trainer: Trainer, ahead: list[Batches]
    ) -> None:
        self.file, self.shown, self.trainer = folder / "state.json", shown, trainer
        self.epochs = trainer.epochs + len(ahead)
        each = trainer.options["accumulate"]
        updates = sum(-(-len(batches) // each) for batches in ahead)
        done = trainer.done.position.get("batch", 0) // each
        self.steps = trainer.replica.steps + updates - done
        self.samples, self.start, self.due = 0, time.monotonic(), 0.0

    def __enter__(self) -> _Followed:
        self.shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, SystemExit) and error.code == config.EXIT_REQUEUE
        state = "finished" if error is None else "stopped" if stopped else "failed"
        self._write(state)
        self.shown.__exit__(kind, error, trace)

    def step(self, samples: int) -> None:
        self.shown.step(samples)
        self.samples += samples
        now = time.monotonic()
        if now >= self.due:
            self._write("running")
            self.due = now + STATE_SECONDS

    def line(self, text: str) -> None:
        self.shown.line(text)

    def _write(self, state: str) -> None:
        trainer, spent = self.trainer, time.monotonic() - self.start
        loss = trainer.losses.mean()
        now = {
            "state": state,
            "time": time.time(),
            "step": trainer.replica.steps,
            "steps": self.steps,
            "epoch": min(trainer.epochs + 1, self.epochs),
            "epochs": self.epochs,
            "loss": loss if math.isfinite(loss) else str(loss),  # JSON has no NaN
            "samples_per_second": self.samples / spent if spent else 0.0,
            "ranks": trainer.world.size,
        }
        new = self.file.with_suffix(".new")
        with suppress(OSError):  # training does not end for the sake of those who look on
            new.write_text(json.dumps(now) + "\n")
            new.replace(self.file)


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
