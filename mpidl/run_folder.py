"""The folder of a run: what was asked for, where it runs, and what comes out, written by rank 0.

docs/run_folder.md tells what is in its files.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import clock, config
from mpidl.errors import InvalidArgument, MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from mpidl.data import Batches
    from mpidl.history import Epoch
    from mpidl.meter import Meter
    from mpidl.progress import Progress
    from mpidl.times import Lapped
    from mpidl.trainer import Trainer
    from mpidl.world import World

STATE_SECONDS = 3.0  # between two states of a run for those that follow it
STEPS_SECONDS = 1.0  # between two lines about the steps
LINES = "metrics.jsonl", "times.jsonl"


class RunFolder:
    """What was asked for, a line for each epoch and some steps, times by rank, and how far it is.

    The files of an earlier run in the same folder are kept, as `config.json.1` and so on.
    Collective: each rank tells its host, and if rank 0 cannot write, every rank raises.
    """

    #: Each gets what `write` is given, on the rank that writes.
    listeners: Sequence[Callable[[dict[str, Any]], None]] = ()
    _followed: _Followed | None = None

    def __init__(self, path: str | Path, world: World, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.writes = world.rank == 0
        self.config: dict[str, Any] = {}  #: what config.json holds
        seats = world.gather((platform.node(), sorted(os.sched_getaffinity(0))))
        with world.together():
            self.config = {**settings, **_environment(world, seats)}
            if self.writes:
                self._create(self.config)

    @classmethod
    def opened(cls, path: Path) -> RunFolder:
        """Return the folder that others have made, for a rank that came later. Not collective."""
        made = cls.__new__(cls)
        made.path, made.writes, made.config = path, False, {}
        return made

    def _create(self, settings: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", *LINES, "summary.json"):
                _set_aside(self.path / name)
            text = json.dumps(settings, indent=2, default=_plain)
            (self.path / "config.json").write_text(text + "\n")
            for name in LINES:
                (self.path / name).write_text("")
        except OSError as error:
            raise InvalidArgument(f"cannot write the run folder {self.path}: {error}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, on rank 0."""
        if self.writes:
            self._append("metrics.jsonl", record)
            for listener in self.listeners:
                listener(record)

    def write_epoch(
        self, result: Epoch, lapped: Lapped, first_step: int, noise: dict[str, Any] | None
    ) -> None:
        """Append what an epoch came to, and where the time of each rank went, on rank 0."""
        if not self.writes:
            return
        self.write(
            {
                "kind": "epoch",
                **asdict(result),
                "time": time.time(),
                "phases": _rounded(lapped.phases),
                "moved_bytes": lapped.moved_bytes,
                "peak_memory_bytes": lapped.peak_memory_bytes,
                "noise": noise,
            }
        )
        columns = {
            "epoch": result.epoch,
            "first_step": first_step,
            "steps_per_column": lapped.steps_per_column,
            "seconds": _rounded(lapped.columns),
        }
        self._append("times.jsonl", columns)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, with advice, on rank 0."""
        if self.writes:
            told = json.dumps(_named(_rounded(summary))) + "\n"
            with suppress(OSError):  # training has come to its end
                (self.path / "summary.json").write_text(told)

    def fail(self) -> None:
        """Say in state.json that the run has failed, on rank 0."""
        if self.writes and self._followed is not None:
            self._followed.tell("failed")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(_named(record), default=_plain) + "\n")

    def follow(
        self, shown: Progress, trainer: Trainer, ahead: list[Batches], meter: Meter
    ) -> Progress:
        """Return `shown`, on rank 0 also written to the folder, for the epochs `ahead`."""
        if not self.writes:
            return shown
        self._followed = _Followed(self, shown, trainer, ahead, meter)
        return self._followed


def of_trainer(path: str | Path, trainer: Trainer, asked: dict[str, Any]) -> RunFolder:
    """Return the folder of a trainer that was asked to fit. Collective."""
    replica = trainer.replica
    codec = replica.choice.codec
    parameters = replica.parameters.values()
    settings = {
        "strategy": replica.choice.name,
        "codec": None if codec is None else str(codec),
        "optimizer": replica.optimizer,
        "device": trainer.device,
        "model": {
            "parameters": sum(p.data.size for p in parameters),
            "bytes": sum(p.data.nbytes for p in parameters),
        },
        **{name: trainer.options[name] for name in ("accumulate", "overlap", "bucket_bytes")},
        "microbatches": trainer.microbatches,
        **asked,
        **trainer.settings,
    }
    return RunFolder(path, trainer.world, settings)


class _Followed:
    """Keeps state.json, and adds lines about the steps to metrics.jsonl, every few seconds.

    Nothing is sent for them: the loss is the mean of this rank's samples.
    """

    def __init__(
        self,
        folder: RunFolder,
        shown: Progress,
        trainer: Trainer,
        ahead: list[Batches],
        meter: Meter,
    ) -> None:
        self.folder, self.file = folder, folder.path / "state.json"
        self.shown, self.trainer, self.meter = shown, trainer, meter
        self.epochs = trainer.epochs + len(ahead)
        each = trainer.options["accumulate"]
        updates = sum(-(-len(batches) // each) for batches in ahead)
        done = trainer.done.position.get("batch", 0) // each
        self.steps = trainer.replica.steps + updates - done
        self.updates = trainer.replica.steps  # of the last line about steps
        self.since, self.due = meter.begin(), 0.0

    def __enter__(self) -> _Followed:
        self.shown.__enter__()
        self.tell("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, SystemExit) and error.code == config.EXIT_REQUEUE
        state = "finished" if error is None else "stopped" if stopped else "failed"
        with suppress(OSError, MpidlError):
            self._write_steps()
        recovers = self.trainer._elastic is not None and isinstance(error, Exception)
        self.tell("running" if recovers else state)  # `Elastic` tells where it does not
        self.shown.__exit__(kind, error, trace)

    def step(self, samples: int) -> None:
        self.shown.step(samples)
        if self.since.seconds() > STEPS_SECONDS:
            with suppress(OSError):  # training does not end for the sake of those who look on
                self._write_steps()
        now = time.monotonic()
        if now >= self.due:
            self.tell("running")
            self.due = now + STATE_SECONDS

    def line(self, text: str) -> None:
        self.shown.line(text)

    def _write_steps(self) -> None:
        made = self.trainer.replica.steps - self.updates
        if made <= 0:
            return
        found = self.since.read()
        each = [spent / made for spent in found.seconds]
        self.updates += made
        self.folder.write(
            {
                "kind": "steps",
                "step": self.updates,
                "count": made,
                "time": time.time(),
                "loss": found.loss,
                "samples_per_second": found.samples_per_second,
                "seconds": _rounded(dict(zip(clock.PHASES, each, strict=True))),
            }
        )

    def tell(self, state: str) -> None:
        """Write state.json."""
        trainer = self.trainer
        now = {
            "state": state,
            "time": time.time(),
            "step": trainer.replica.steps,
            "steps": self.steps,
            "epoch": min(trainer.epochs + 1, self.epochs),
            "epochs": self.epochs,
            "loss": trainer.losses.mean(),
            "samples_per_second": self.meter.samples_per_second,
            "waiting": round(self.meter.waiting, 4),
            "seconds_left": self.meter.seconds_left,
            "ranks": trainer.world.size,
        }
        new = self.file.with_suffix(".new")
        with suppress(OSError):  # as above
            new.write_text(json.dumps(_named(now)) + "\n")
            new.replace(self.file)


def _named(value: Any) -> Any:
    """Return it with the names of numbers that JSON has not: "nan", "inf"."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: Any) -> Any:
    """Return it with numbers of 5 digits: clocks are no better, and lines get short."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _set_aside(file: Path) -> None:
    if file.exists():
        number = next(n for n in count(1) if not Path(f"{file}.{n}").exists())
        file.rename(f"{file}.{number}")


def _environment(world: World, seats: list[tuple[str, list[int]]]) -> dict[str, Any]:
    from mpidl import __version__

    here = [seats[rank][1] for rank in world.members[world.node]]
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "ranks": world.size,
        "nodes": world.nodes,
        "hosts": [host for host, _ in seats],
        "ranks_on_node": world.local_size,
        "cores": len(set().union(*here)),  # which those may use
        "cpu": _cpu(),
        "threads": config.threads(),
        "mpi": world.MPI.Get_library_version().split("\n")[0].rstrip("\0 "),
        "versions": {
            "mpidl": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        # one level: what stands inside comes here too, with its own name
        return {type(value).__name__: {f.name: getattr(value, f.name) for f in fields(value)}}
    return str(value)
