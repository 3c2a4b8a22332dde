"""Progress of a fit, shown by rank 0: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from mpidl import config

if TYPE_CHECKING:
    from types import TracebackType

    from mpidl.done import Done
    from mpidl.history import Epoch
    from mpidl.meter import Meter
    from mpidl.strategies import Choice
    from mpidl.world import World

LINE_SECONDS = 5.0  # between two lines of a log file
BAR_SECONDS = 0.2  # between two readings of the meter
PIPE_SECONDS = 0.1


class Progress(Protocol):
    """A context in which steps are counted and lines are shown."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None: ...

    def step(self, samples: int) -> None:
        """Count a step, of `samples` samples of all ranks."""

    def line(self, text: str) -> None:
        """Show a line: what an epoch came to, say."""


def introduction(world: World, choice: Choice, done: Done) -> str:
    """Return the first line of a fit; from where it goes on is told once."""
    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
    nodes = f"{world.nodes} node{'s' * (world.nodes > 1)}"
    coded = f", codec {choice.codec}" if choice.codec is not None else ""
    resumed, done.told = f"; {done.told}" if done.told else "", None
    return f"{ranks} on {nodes}, strategy {choice.name} ({choice.why}){coded}{resumed}"


def line(result: Epoch, epochs: int) -> str:
    """Return what one epoch came to, of `epochs`."""
    metrics = "".join(f", test {name} {value:.4f}" for name, value in result.metrics.items())
    rate = f"{result.samples_per_second:,.0f} samples/s"
    number = f"{result.epoch:{len(str(epochs))}} of {epochs}"
    return f"epoch {number}: loss {result.loss:.4f}{metrics}, {rate}"


def make(meter: Meter, *, shown: bool) -> Progress:
    """Return what shows `meter`: nothing, a bar, or lines on standard error."""
    if not shown:
        return Silent(meter)
    width = config.terminal_width()
    if width or sys.stderr.isatty():
        return _Bar(meter, width)
    return _Lines(meter)


def state(meter: Meter, loss: float) -> str:
    """Return the loss, if there is one, the speed, and the share of time waiting for others."""
    shown = f"loss {loss:.4f}, " if not math.isnan(loss) else ""
    waits = f", {meter.waiting:.0%} waiting" if meter.waiting >= 0.005 else ""
    return f"{shown}{meter.samples_per_second:,.0f} samples/s{waits}"


def duration(seconds: float | None) -> str:
    """Return "1:02:03", "2:03"; "-:--" where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Silent:
    """Counts, and shows nothing."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def step(self, samples: int) -> None:
        """Count a step."""
        self.meter.step(samples)

    def line(self, text: str) -> None:
        """Show nothing."""


class _Lines(Silent):
    def __init__(self, meter: Meter) -> None:
        super().__init__(meter)
        self.since = meter.begin()

    def step(self, samples: int) -> None:
        super().step(samples)
        if self.since.seconds() > LINE_SECONDS:
            meter, loss = self.meter, self.since.read().loss
            left = duration(meter.seconds_left)
            self.line(f"step {meter.done} of {meter.steps}, {state(meter, loss)}, {left} left")

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, meter: Meter, width: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.piped = width is not None
        self.meter, self.since = meter, meter.begin()
        console = Console(stderr=True, width=width, force_terminal=True)
        self.bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[left]} left"),
            console=console,
        )
        self.task = self.bar.add_task("fit", total=meter.steps, state="", left=duration(None))

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self.bar.stop()
        if self.piped:  # two pipes lead to the terminal: let this one empty before results follow
            time.sleep(PIPE_SECONDS)

    def step(self, samples: int) -> None:
        self.meter.step(samples)
        if self.since.seconds() > BAR_SECONDS:
            self._show()

    def _show(self) -> None:
        meter = self.meter
        told = state(meter, self.since.read().loss)
        left = duration(meter.seconds_left)
        self.bar.update(self.task, completed=meter.done, state=told, left=left)

    def line(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
