"""`History`: what `Trainer.fit` returns, a list of epochs that a notebook shows as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from mpidl.errors import DataError
from mpidl.markup import table
from mpidl.refuse import refuses

if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; the same on every rank."""

    epoch: int  #: from 1
    steps: int  #: since the trainer was made
    loss: float  #: of training: mean over the samples, each taken before its own update
    metrics: dict[str, float]  #: of the samples given as `evaluate`; "loss" among them
    seconds: float  #: spent in training steps, on the slowest rank
    samples_per_second: float  #: of all ranks together


class History(list[Epoch]):
    """One `Epoch` each, in a list: equal to any list of the same; a part of it is a history too."""

    @classmethod
    @refuses
    def read(cls, folder: str | os.PathLike[str]) -> History:
        """Return the epochs in the metrics.jsonl of a run folder, also while the run goes on.

        Raises DataError where there is none, or a line is no epoch's.
        """
        path = Path(folder) / "metrics.jsonl"
        try:
            *lines, _ = path.read_text().split("\n")  # what has no end yet is being written
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        made = cls()
        for i, line in enumerate(lines):
            if (found := _epoch(path, i, line)) is not None:
                while made and made[-1].epoch >= found.epoch:  # made again: ranks had died
                    made.pop()
                made.append(found)
        return made

    @overload
    def __getitem__(self, key: SupportsIndex) -> Epoch: ...

    @overload
    def __getitem__(self, key: slice) -> History: ...

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return History(found) if isinstance(key, slice) else found

    def __repr__(self) -> str:
        if not self:
            return "History(0 epochs)"
        first, last = self[0], self[-1]
        s = "s" * (len(self) > 1)
        came_from = f"{first.loss:.4f} to " * (len(self) > 1)
        metrics = "".join(f", test {name} {value:.4f}" for name, value in last.metrics.items())
        return f"History({len(self)} epoch{s}: loss {came_from}{last.loss:.4f}{metrics})"

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for epoch in self for name in epoch.metrics))
        head = ("epoch", "steps", "loss", *(f"test {name}" for name in names), "seconds")
        return table((*head, "samples/s"), (_cells(epoch, names) for epoch in self))


def _epoch(path: Path, number: int, line: str) -> Epoch | None:
    import json  # few need it

    try:
        record = json.loads(line)
        if record.get("kind", "epoch") != "epoch":
            return None
        made = {f.name: record[f.name] for f in fields(Epoch) if f.name in record}
        made["loss"] = float(made["loss"])  # "nan", where it is no number
        made["metrics"] = {name: float(value) for name, value in made["metrics"].items()}
        return Epoch(**made)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}, line {number + 1}: expected an epoch: {error}") from error


def _cells(epoch: Epoch, names: list[str]) -> tuple[str, ...]:
    metrics = (f"{epoch.metrics[n]:.4f}" if n in epoch.metrics else "-" for n in names)
    numbers = f"{epoch.epoch}", f"{epoch.steps:,}", f"{epoch.loss:.4f}"
    return (*numbers, *metrics, f"{epoch.seconds:.2f}", f"{epoch.samples_per_second:,.0f}")
