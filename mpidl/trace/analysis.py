"""What a trace says of each step: who came last to the average, why, and what that cost.

The critical path of a step runs along the rank that came last, from the end of the step before:
its own computing and waiting for data until it came to the average; then along the one that had
made the average and the update last. What other ranks did meanwhile could have taken longer, and
nobody would have noticed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from mpidl.clock import PHASES, REDUCE, UPDATE, WAIT
from mpidl.trace.tracks import LOCAL, LOCAL_SECONDS, Interval, Span, Step

RANGE_SHARE = 0.5  # of a delay that a range must explain to be named
STARTED = "between steps"  # an evaluation, a checkpoint, or the end of the step before


@dataclass
class Process:
    """One rank's part of a trace; times in seconds, in order."""

    name: str  #: "rank 3 on b"
    phases: list[Interval] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  #: of the thread that trains

    @cached_property
    def _begins(self) -> list[float]:
        return [interval.begin for interval in self.phases]

    def between(self, begin: float, end: float) -> list[Interval]:
        """Return the phases of which a part lies between two times."""
        first = max(0, bisect_right(self._begins, begin) - 1)
        found = self.phases[first : bisect_left(self._begins, end)]
        return [interval for interval in found if interval.end > begin]

    def spent(self, begin: float, end: float) -> list[float]:
        """Return the seconds of each phase between two times."""
        seconds = [0.0] * len(PHASES)
        for interval in self.between(begin, end):
            part = min(interval.end, end) - max(interval.begin, begin)
            share = part / (interval.end - interval.begin)
            for phase in range(len(PHASES)):
                seconds[phase] += interval.of(phase) * share
        return seconds


@dataclass
class Found:
    """What one step came to."""

    step: int
    begin: float  #: seconds from the start of the trace
    seconds: float  #: until the last rank had made it
    last: str | None  #: who came last to the average; None on one rank
    late: float  #: seconds, after the median of the others
    because: str  #: a phase, or a range
    seconds_more: float  #: that the last one spent in that, beyond the median of the others
    wait: float  #: seconds of each phase on the critical path
    reduce: float
    update: float
    phases: dict[str, float]  #: all of them
    ranks: int  #: that took part


def grouped(processes: dict[int, Process]) -> list[dict[int, Step]]:
    """Return the steps of all processes that belong together, in order of time.

    Numbers may come again, with another trainer or after ranks have died: steps of one number
    belong together while they overlap, and none is of the same process.
    """
    by_number: dict[int, list[tuple[Step, int]]] = defaultdict(list)
    for pid, process in processes.items():
        for step in process.steps:
            by_number[step.number].append((step, pid))
    groups: list[dict[int, Step]] = []
    for steps in by_number.values():
        steps.sort(key=lambda pair: pair[0].end)
        group: dict[int, Step] = {}
        end = 0.0
        for step, pid in steps:
            if not group or pid in group or step.begin > end:
                group = {}
                groups.append(group)
            group[pid], end = step, step.end
    return sorted(groups, key=lambda group: max(step.end for step in group.values()))


def steps_of(processes: dict[int, Process]) -> list[Found]:
    """Return what each step came to, in order of time."""
    found = []
    before = float("-inf")
    ranges = {pid: _Ranges(process.spans) for pid, process in processes.items()}
    for group in grouped(processes):
        ways = {pid: _way(processes[pid], step) for pid, step in group.items()}
        end = max(step.end for step in group.values())
        begin = min(max(before, min(step.begin for step in group.values())), end)
        before = end
        pid = max(ways, key=lambda pid: ways[pid].arrived)
        way, others = ways[pid], [ways[other] for other in ways if other != pid]
        last, late, because, more = None, 0.0, "", 0.0
        if others:
            last = processes[pid].name
            late = way.arrived - median(other.arrived for other in others)
            because, more = _why(pid, ways, ranges)
        first = processes[pid].spent(begin, way.arrived)
        until = max(ways, key=lambda pid: ways[pid].step.end)
        second = processes[until].spent(way.arrived, end)
        spent = {name: first[i] + second[i] for i, name in enumerate(PHASES)}
        found.append(
            Found(
                step=group[pid].number,
                begin=begin,
                seconds=end - begin,
                last=last,
                late=max(0.0, late),
                because=because,
                seconds_more=more,
                wait=spent[PHASES[WAIT]],
                reduce=spent[PHASES[REDUCE]],
                update=spent[PHASES[UPDATE]],
                phases=spent,
                ranks=len(group),
            )
        )
    return found


@dataclass
class _Way:
    """One rank's way through a step."""

    step: Step
    arrived: float  #: when it came to the average
    before: list[float]  #: seconds of each phase until then


def _way(process: Process, step: Step) -> _Way:
    """Return how a rank went through a step.

    It comes to the average where the last work of its own ends before the update: what is shorter
    than LOCAL_SECONDS belongs to the average.
    """
    arrived = step.end
    for interval in reversed(process.between(step.begin, step.end)):
        if interval.phase not in LOCAL:
            arrived = max(interval.begin, step.begin)
        elif min(interval.end, step.end) - max(interval.begin, step.begin) > LOCAL_SECONDS:
            break
    return _Way(step, arrived, process.spent(step.begin, arrived))


def _why(pid: int, ways: dict[int, _Way], ranges: dict[int, _Ranges]) -> tuple[str, float]:
    """Return what made a rank late, and by how many seconds: a range where one explains it."""
    others = [other for other in ways if other != pid]
    way = ways[pid]
    more = {
        name: way.before[i] - median(ways[other].before[i] for other in others)
        for i, name in enumerate(PHASES)
    }
    more[STARTED] = way.step.begin - median(ways[other].step.begin for other in others)
    because = max(more, key=more.__getitem__)
    spent = {p: ranges[p].spent(ways[p].step.begin, ways[p].arrived) for p in ways}
    best = max(
        (seconds - median(spent[other].get(name, 0.0) for other in others), name)
        for name, seconds in {"": 0.0, **spent[pid]}.items()
    )
    if best[0] >= RANGE_SHARE * more[because] and best[1]:
        return f"range {best[1]}", best[0]
    return because, more[because]


class _Ranges:
    """The ranges of one thread, with the seconds of each that are in no other range in it."""

    def __init__(self, spans: list[Span]) -> None:
        self.pieces: list[tuple[float, float, str]] = []
        stack: list[tuple[float, str]] = []  # ends and names
        at = 0.0

        def cover(until: float) -> None:
            nonlocal at
            if stack and until > at:
                self.pieces.append((at, until, stack[-1][1]))
            at = max(at, until)

        for span in spans:
            while stack and stack[-1][0] <= span.begin:
                cover(stack[-1][0])
                stack.pop()
            cover(span.begin)
            at = span.begin
            stack.append((span.end, span.name))
        while stack:
            cover(stack[-1][0])
            stack.pop()
        self._begins = [piece[0] for piece in self.pieces]

    def spent(self, begin: float, end: float) -> dict[str, float]:
        """Return the seconds of each range between two times."""
        found: dict[str, float] = defaultdict(float)
        for i in range(max(0, bisect_right(self._begins, begin) - 1), len(self.pieces)):
            first, last, name = self.pieces[i]
            if first >= end:
                break
            if last > begin:
                found[name] += min(last, end) - max(first, begin)
        return found


def totals(processes: dict[int, Process], found: list[Found]) -> dict[str, Any]:
    """Return what all steps together say, as JSON holds it."""
    path = {name: sum(step.phases[name] for step in found) for name in PHASES}
    all_seconds = sum(path.values()) or 1.0
    last: dict[str, list[float]] = {process.name: [] for process in processes.values()}
    causes: dict[str, float] = defaultdict(float)
    for step in found:
        if step.last is not None:
            last[step.last].append(step.late)
            causes[step.because] += step.late
    named: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    calls: dict[str, int] = defaultdict(int)
    for process in processes.values():
        for span in process.spans:
            named[span.name][process.name] += span.end - span.begin
            calls[span.name] += 1
    ranges: list[dict[str, Any]] = []
    for name, by_rank in named.items():
        seconds, most = max((seconds, rank) for rank, seconds in by_rank.items())
        whole = {"name": name, "calls": calls[name], "seconds": sum(by_rank.values())}
        ranges.append({**whole, "most": most, "most_seconds": seconds})
    return {
        "steps": len(found),
        "seconds": sum(step.seconds for step in found),
        "path": {
            name: {"seconds": seconds, "share": seconds / all_seconds}
            for name, seconds in path.items()
        },
        "stragglers": [
            {"rank": name, "last": len(late), "seconds": sum(late)}
            for name, late in sorted(last.items(), key=lambda item: -sum(item[1]))
        ],
        "causes": dict(sorted(causes.items(), key=lambda item: -item[1])),
        "ranges": sorted(ranges, key=lambda one: -one["seconds"]),
    }


def report(processes: dict[int, Process], worst: int) -> dict[str, Any]:
    """Return {"worst", "totals", "ranks"}: the steps that took the longest, and all together."""
    found = steps_of(processes)
    longest = sorted(found, key=lambda step: -step.seconds)[:worst]
    return {
        "ranks": [process.name for process in processes.values()],
        "worst": [asdict(step) for step in longest],
        "totals": totals(processes, found),
    }
