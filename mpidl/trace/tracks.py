"""What a part of a trace means: phases, steps and ranges of one process, by one clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpidl.clock import COMPUTE, OTHER, PHASES
from mpidl.trace.parts import PHASE, SECONDS, SPAN, SPLIT, STEP, TRACK
from mpidl.trace.ranges import AVERAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from mpidl.trace.parts import Part

    Shift = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]

LOCAL_SECONDS = 2e-4  # of its own that a rank may spend within an average
LOCAL = (0, 1, 5)  # phases in which nobody waits for other ranks: compute, data, other


class Interval(NamedTuple):
    """A phase, or several that took turns. Times in seconds."""

    begin: float
    end: float
    phase: int  #: -1 for several
    seconds: tuple[float, ...] = ()  #: of each phase then

    def of(self, phase: int) -> float:
        """Return the seconds in this phase."""
        if self.phase < 0:
            return self.seconds[phase]
        return self.end - self.begin if self.phase == phase else 0.0


class Step(NamedTuple):
    """A step: from its first batch, or the step before, to its update."""

    number: int
    begin: float
    end: float
    nbytes: float  #: received from other ranks


class Span(NamedTuple):
    """A range, in a thread."""

    track: int
    name: str
    begin: float
    end: float
    nbytes: float


@dataclass
class Tracks:
    """Those of one process, each in order of time."""

    phases: list[Interval] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    moves: list[tuple[float, int, int]] = field(default_factory=list)  #: when, new rank, of many
    marked: bool = True  #: False where steps are averages


def of_part(part: Part, shift: Shift) -> Tracks:
    """Return what a part tells, at the times that `shift` makes of its own."""
    events = part.events.copy()
    kinds = events[:, 0]
    for kind, columns in ((PHASE, (2, 3)), (SPLIT, (2, 3)), (SPAN, (2, 3)), (STEP, (2,))):
        rows = kinds == kind
        for column in columns:
            events[rows, column] = shift(events[rows, column])
    made = Tracks()
    marks: list[tuple[int, float, float]] = []
    halves: tuple[float, ...] | None = None
    for kind, a, b, c, d in events.tolist():
        if kind == PHASE:
            made.phases.append(Interval(b, c, int(a) if 0 <= a < len(PHASES) else OTHER))
        elif kind == SPLIT:
            halves = a, b, c, d
        elif kind == SECONDS and halves is not None:
            wait, begin, end, reduce = halves
            halves = None
            made.phases.append(Interval(begin, end, -1, (a, b, wait, reduce, c, d)))
        elif kind == STEP:
            marks.append((int(a), b, c))
        elif kind == SPAN:
            track, name = divmod(int(a), TRACK)
            if name < len(part.names):
                made.spans.append(Span(track, part.names[name], b, c, d))
    start = float(shift(np.array([part.begin]))[0])  # the clock has run since its import
    phases = [i._replace(begin=max(i.begin, start)) for i in made.phases if i.end > start]
    made.phases = sorted(phases)
    made.spans.sort(key=lambda span: (span.begin, -span.end))
    at = shift(np.array([moved[0] for moved in part.moves]))
    made.moves = [(float(t), *moved[1:]) for t, moved in zip(at, part.moves, strict=True)]
    made.marked = bool(marks)
    marks.sort(key=lambda mark: mark[1])
    made.steps = steps_of(made.phases, marks or averages(made.spans))
    return made


def steps_of(phases: list[Interval], marks: Iterable[tuple[int, float, float]]) -> list[Step]:
    """Return the steps that end at `marks`: (number, end, bytes so far).

    What is nothing of training, such as an evaluation, and what comes before that, is in neither of
    the steps that it stands between: where there are phases of training at all.
    """
    trains = any(interval.of(COMPUTE) for interval in phases)
    steps = []
    begin = phases[0].begin if phases else 0.0
    before, at = 0.0, 0
    for number, end, nbytes in marks:
        while at < len(phases) and phases[at].end <= end:
            interval = phases[at]
            length = interval.end - interval.begin
            if trains and interval.phase == OTHER and length > LOCAL_SECONDS:
                begin = max(begin, interval.end)
            at += 1
        steps.append(Step(number, min(begin, end), end, nbytes - before))
        begin, before = end, nbytes
    return steps


def averages(spans: Iterable[Span]) -> list[tuple[int, float, float]]:
    """Return where averages ended, as `steps_of` wants it: for scripts that only call `average`."""
    marks: list[tuple[int, float, float]] = []
    nbytes = 0.0
    for span in spans:
        if span.name == AVERAGE:
            nbytes += span.nbytes
            marks.append((len(marks), span.end, nbytes))
    return marks


def lanes(spans: Iterable[Span]) -> list[tuple[int, Span]]:
    """Return each of `spans`, in order of their beginnings, with the number of a lane.

    In a lane they stand beside or in each other; what begins in one and ends after it, as with
    generators, goes to another lane.
    """
    placed = []
    stacks: list[list[float]] = []
    for span in spans:
        lane = 0
        while lane < len(stacks):
            stack = stacks[lane]
            while stack and stack[-1] <= span.begin:
                stack.pop()
            if not stack or span.end <= stack[-1]:
                break
            lane += 1
        else:
            stacks.append([])
        stacks[lane].append(span.end)
        placed.append((lane, span))
    return placed
