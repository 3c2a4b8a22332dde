"""Progress of a fit, shown by rank 0: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from mpidl import config

if TYPE_CHECKING:
    from types import TracebackType

    from mpidl.done import Done
    from mpidl.history import Epoch
    from mpidl.strategies import Choice
    from mpidl.world import World

LINE_SECONDS = 5.0  # between two lines of a log file
PIPE_SECONDS = 0.1


class Progress(Protocol):
    """A context in which steps are counted and lines are shown."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None: ...

    def step(self, samples: int) -> None:
        """Count one step, of `samples` samples of the global batch."""

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


def make(steps: int, *, shown: bool) -> Progress:
    """Return the progress for `steps` steps: silent, a bar, or lines on standard error."""
    if not shown:
        return _Silent()
    width = config.terminal_width()
    if width or sys.stderr.isatty():
        return _Bar(steps, width)
    return _Lines(steps)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def step(self, samples: int) -> None: ...

    def line(self, text: str) -> None: ...


class _Lines(_Silent):
    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.samples = steps, 0, 0
        self.start = self.shown = time.perf_counter()

    def step(self, samples: int) -> None:
        self.done += 1
        self.samples += samples
        now = time.perf_counter()
        if now - self.shown > LINE_SECONDS:
            self.shown = now
            rate = self.samples / (now - self.start)
            self.line(f"step {self.done} of {self.steps}, {rate:,.0f} samples/s")

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, steps: int, width: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.piped = width is not None
        console = Console(stderr=True, width=width, force_terminal=True)
        self.bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[rate]:,.0f} samples/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self.task = self.bar.add_task("fit", total=steps, rate=0.0)
        self.samples, self.start = 0, time.perf_counter()

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.piped:  # two pipes lead to the terminal: let this one empty before results follow
            time.sleep(PIPE_SECONDS)

    def step(self, samples: int) -> None:
        self.samples += samples
        rate = self.samples / (time.perf_counter() - self.start)
        self.bar.update(self.task, advance=1, rate=rate)

    def line(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, emoji=False)
