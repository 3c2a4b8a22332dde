"""What becomes of an attempt at a supervised run, by what its ranks have told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from mpidl.cli.listener import Member

DEATH_SECONDS = 1.0  # that the launcher has to end a job of which a rank has died
START_SECONDS = 300.0  # between the first rank's report and the last one's
SOON_SECONDS = 10.0  # an attempt that fails so soon, and gets no further, was in vain
STEP_SECONDS = 300.0  # one without a step, if so soon: not all scripts tell of their steps
VAIN = 2  # such attempts in a row, at most


def completed(members: list[Member]) -> int | None:
    """Return the status of a run that is complete; None of one that is not.

    Complete is what as many ranks say as the world had when it ended, all with the same status.
    """
    ended = [member for member in members if member.status is not None]
    sizes = {member.size for member in ended}
    statuses = {member.status for member in ended}
    if sizes == {len(ended)} and len(statuses) == 1:
        return statuses.pop()
    return None


@final
class Verdict:
    """What becomes of an attempt, by what is known of its ranks.

    Args:
        elastic: whether ranks go on where one has died.
        ranks: that were started.
        silence: in seconds, after which a host is given up.
    """

    def __init__(self, *, elastic: bool, ranks: int, silence: float) -> None:
        self.elastic, self.ranks, self.silence = elastic, ranks, silence
        self._first: float | None = None  # when there was a rank

    def reason(self, members: list[Member], now: float) -> str:
        """Return why the attempt is over, while its launcher lives; or nothing."""
        if not members:
            return ""
        self._first = self._first if self._first is not None else now
        living = [member for member in members if member.lives]
        silent = [member for member in living if now - member.heard > self.silence]
        if silent:
            hosts = ", ".join(sorted({member.host for member in silent}))
            return f"{hosts} has been silent for {self.silence:g} s"
        lost = [member for member in members if member.closed and member.status is None]
        late = [member for member in lost if now - member.closed_at > DEATH_SECONDS]
        if late and (not self.elastic or not living):
            return told_of_lost(lost)
        if len(members) < self.ranks and now - self._first > START_SECONDS:
            return f"{self.ranks - len(members)} of {self.ranks} ranks have not started"
        return ""


def told_of_lost(lost: list[Member]) -> str:
    """Return the words for ranks that have died, the first one first."""
    first = min(lost, key=lambda member: member.closed_at)
    return f"rank {first.rank} on {first.host} was lost" + f", and {len(lost) - 1} more" * (
        len(lost) > 1
    )


@dataclass
class Vain:
    """Counts attempts in a row that failed by themselves, and got no further than others."""

    count: int = 0
    furthest: int = 0  #: step of all attempts

    def add(self, steps: int, seconds: float, *, hosts_lost: bool) -> str:
        """Count one that failed. Returns why another would fail as it did; or nothing."""
        further, self.furthest = steps > self.furthest, max(steps, self.furthest)
        soon = seconds < SOON_SECONDS and not further
        vain = not hosts_lost and (soon or (steps == 0 and seconds < STEP_SECONDS))
        self.count = self.count + 1 if vain else 0
        if self.count < VAIN:
            return ""
        what = "before their first step" if steps == 0 else f"soon, and not beyond step {steps}"
        return f"{self.count} attempts in a row failed {what}"
