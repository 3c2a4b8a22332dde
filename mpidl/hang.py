"""What is known of a job that has come to a halt: who waits, for whom, and whether it can end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpidl.marks import some

if TYPE_CHECKING:
    from collections.abc import Mapping

LATE = 10  # times the limit: a rank that answers may yet come
STACKS = 8  # told at most


@dataclass(frozen=True)
class Wait:
    """A call in which a rank waits."""

    call: str
    number: int  #: among the calls of this rank in this group
    seconds: float
    ranks: tuple[int, ...] | None  #: of the group; None for all


@dataclass(frozen=True)
class State:
    """What a rank says of itself."""

    waits: tuple[Wait, ...] = ()  #: the longest first
    calls: int = 0  #: made so far, of the whole world
    site: str = ""  #: of the user's code, where the main thread is
    stack: tuple[str, ...] = ()  #: of the main thread
    ended: bool = False  #: whether its script has come to its end
    debugged: bool = False


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    process: int

    def __str__(self) -> str:
        return f"on {self.host} (process {self.process})"


@dataclass(frozen=True)
class Halt:
    """A wait that has lasted for the limit.

    Args:
        states: of each rank that has answered.
        silent: what else is known of each that has not, or nothing: "stopped", "gone".
        limit: in seconds.
        asked: whether the others could be asked at all.
    """

    states: Mapping[int, State]
    silent: Mapping[int, str]
    limit: float
    asked: bool = True

    @property
    def waiting(self) -> dict[int, Wait]:
        """By rank, the wait that counts."""
        return {rank: state.waits[0] for rank, state in self.states.items() if state.waits}

    @property
    def seconds(self) -> float:
        """How long the first of them has waited."""
        return max((wait.seconds for wait in self.waiting.values()), default=0.0)

    @property
    def debugged(self) -> bool:
        """Whether a person has stopped a rank to look at it."""
        return any(state.debugged for state in self.states.values()) or (
            "in a debugger" in self.silent.values()
        )

    @property
    def awaited(self) -> set[int]:
        """The ranks without which the calls cannot end, and that are in none."""
        awaited: set[int] = set()
        for wait in self.waiting.values():
            everyone = {*self.states, *self.silent}
            awaited |= everyone if wait.ranks is None else set(wait.ranks)
        return awaited - self.waiting.keys()

    @property
    def ended(self) -> list[int]:
        """Those of them whose script has come to its end."""
        return [r for r in sorted(self.awaited) if r in self.states and self.states[r].ended]

    @property
    def patience(self) -> float:
        """How long to wait before the job is ended; seconds."""
        if self.ended:
            return self.limit
        alive = [rank for rank in self.awaited if not self.silent.get(rank)]
        return self.limit * (LATE if alive else 2)

    def key(self) -> set[tuple[int, int]]:
        """Return what tells this halt from a later one."""
        return {(rank, wait.number) for rank, wait in self.waiting.items()}

    def report(self, places: Mapping[int, Place], *, ends: bool) -> str:
        """Return what to tell, as lines. `ends`: whether the job is to be ended at last."""
        have = "have" if len(self.waiting) > 1 else "has"
        lines = [f"mpidl: {some(self.waiting)} {have} waited for {self.seconds:.0f} s"]
        groups: dict[str, list[int]] = {}
        for rank, wait in sorted(self.waiting.items()):
            told = f"in {wait.call} at {self.states[rank].site}"
            told += f", its call {wait.number}" * (wait.ranks is None)
            groups.setdefault(told, []).append(rank)
        lines += [f"  {some(ranks)}: {told}" for told, ranks in groups.items()]
        lines += self._late(places)
        if len(groups) > 1:
            lines.append("  MPIDL_CHECK=collectives tells at which call ranks part")
        if not ends:
            lines.append("  it goes on, as MPIDL_STALL=warn asks")
        elif self.seconds < self.patience:
            lines.append(
                f"  the job is ended after {self.patience:.0f} s; MPIDL_STALL_SECONDS and "
                "MPIDL_STALL=warn change that"
            )
        return "\n".join(lines) + "\n"

    def _late(self, places: Mapping[int, Place]) -> list[str]:
        """Tell of each rank that is in no call."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for rank in sorted(self.awaited):
            if rank in self.silent:
                reason = self.silent[rank]
                told = [f"does not answer: {reason or UNKNOWN}" if self.asked else UNASKED]
            elif self.states[rank].ended:
                told = ["has come to the end of its script"]
            else:
                state = self.states[rank]
                told = [f"is elsewhere, after {state.calls} calls", *state.stack]
            groups.setdefault(tuple(told), []).append(rank)
        lines = []
        for (what, *more), ranks in list(groups.items())[:STACKS]:
            where = ", ".join(f"{places[rank]}" for rank in ranks[:2])
            dots = ", ..." * (len(ranks) > 2)
            lines.append(f"  {some(ranks)} {where}{dots}: {what}")
            lines += [f"    {line}" for line in more]
        if len(groups) > STACKS:
            lines.append(f"  and {len(groups) - STACKS} more kinds of ranks")
        return lines


UNKNOWN = "its host is gone, or code that is no Python's holds the interpreter"
UNASKED = "cannot be asked, without MPI_THREAD_MULTIPLE"
