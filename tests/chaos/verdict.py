"""What is wrong with a run: against its trial, and the same training without faults."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.chaos.run import Run, told

if TYPE_CHECKING:
    from tests.chaos.trial import Trial

#: Lines of output that are explained: pattern -> why they come.
KNOWN: dict[str, str] = {
    r"^NBC_Progress: an error \d+ was found": "Open MPI's non-blocking calls end as a rank dies",
    r"^Error in NBC_Start_round\(\) \(-1\)": "as there",
    r"^\[warn\] Epoll \w+\(\d\) on fd \d+ failed.*Bad file descriptor": "libevent: the connection "
    "to a rank that was just killed was closed before its event was removed",
    r"pmix_ptl_base: send_msg: write failed": "the launcher answers a rank that was just killed",
}
TOLERANCE = 1e-9  # relative, in float64, after all steps
WRONG = re.compile(r"traceback|error|warning|abort|fail|corrupt|segmentation", re.IGNORECASE)


@dataclass
class Verdict:
    hung: str = ""  #: each is empty where all is well, or says what is not
    lost_steps: str = ""
    wrong_weights: str = ""
    unexplained_errors: str = ""
    kills: int = 0
    recoveries: list[float] = field(default_factory=list)  #: seconds

    @property
    def problems(self) -> dict[str, str]:
        names = ("hung", "lost_steps", "wrong_weights", "unexplained_errors")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def judge(trial: Trial, how: str, run: Run, alone: Path) -> Verdict:
    """Compare what `run` left with what the training in the folder `alone` did."""
    found = Verdict()
    happened = told(run.folder, "faults/*.json").values()
    ends = told(run.folder, "end-*.json")
    killed = {fault["rank"]: fault["time"] for fault in happened if "Kill" in fault["fault"]}
    killed = {rank: when for rank, when in killed.items() if rank not in ends}  # too late
    found.kills = len(killed)
    expected = told(alone, "end-*.json").get(0)
    if run.status is None:
        found.hung = f"after {run.seconds:.0f} s\n{run.stacks}"
        return found
    if expected is None:
        found.unexplained_errors = f"without faults: {(alone / 'output').read_text()}"
        return found
    missing = set(range(trial.ranks)) - set(ends) - set(killed)
    wrong = []
    if run.status:
        wrong.append(f"exit status {run.status}")
    if how == "elastic" and missing:
        wrong.append(f"ranks {sorted(missing)} came to no end")
    if run.left:
        wrong.append(f"processes {run.left} outlived the launcher")
    if left := in_memory(run.folder):
        wrong.append(f"left in memory: {', '.join(left)}")
    wrong += unexplained(run.output) if how == "elastic" else []
    found.unexplained_errors = "\n".join(wrong)
    lost, weights = [], []
    for rank, end in ends.items():
        if end["steps"] != trial.steps or end["epochs"] != expected["epochs"]:
            lost.append(f"rank {rank}: {end['steps']} steps, {end['epochs']}: not {trial.steps}")
        if end["stored"] != end["weights"]:
            weights.append(f"rank {rank}: the last checkpoint holds other weights")
        if trial.training["microbatches"] is None:
            weights += [f"rank {rank}: {text}" for text in distant(rank, run.folder, alone)]
            continue
        if end["weights"] != expected["weights"]:
            weights.append(f"rank {rank}: other weights than without faults")
        if end["losses"] != expected["losses"]:
            weights.append(f"rank {rank}: losses {end['losses']}, not {expected['losses']}")
    if not ends and not run.status:
        lost.append("no rank came to its end")
    steps = {rank: read_steps(run.folder / f"steps-{rank}") for rank in range(trial.ranks)}
    for rank, lines in steps.items():
        lost += [f"rank {rank}: {gap}" for gap in gaps(lines)] if how == "elastic" else []
    found.lost_steps, found.wrong_weights = "\n".join(lost), "\n".join(weights)
    if how == "elastic":
        found.recoveries = recoveries(trial.ranks, sorted(killed.values()), steps)
    return found


def distant(rank: int, folder: Path, alone: Path) -> list[str]:
    """Return what differs by more than rounding may, which depends on the number of ranks."""
    found = []
    with (
        np.load(folder / f"weights-{rank}.npz") as mine,
        np.load(alone / "weights-0.npz") as expected,
    ):
        for name in expected:
            difference = float(np.abs(mine[name] - expected[name]).max())
            if not difference <= TOLERANCE * float(np.abs(expected[name]).max()):
                found.append(f"{name} differs by up to {difference}")
    return found


def in_memory(folder: Path) -> list[str]:
    """Return what a run has left under /dev/shm."""
    known = {line for path in folder.glob("memory-*") for line in path.read_text().splitlines()}
    return sorted(line for line in known if Path(line).exists())


def read_steps(path: Path) -> list[tuple[float, int, int]]:
    """Return (time, steps, size) of each update that a rank told of."""
    if not path.exists():
        return []
    words = [line.split() for line in path.read_text().splitlines()]
    return [(float(when), int(steps), int(size)) for when, steps, size in words]


def gaps(lines: list[tuple[float, int, int]]) -> list[str]:
    """Return where steps do not follow: only after a recovery, on fewer ranks, may they go back."""
    found = []
    before, ranks = 0, None
    for _, steps, size in lines:
        back = ranks is not None and size < ranks and 1 <= steps <= before + 1
        if steps != before + 1 and not back:
            found.append(f"step {steps} on {size} ranks after step {before} on {ranks}")
        before, ranks = steps, size
    return found


def recoveries(
    ranks: int, kills: list[float], steps: dict[int, list[tuple[float, int, int]]]
) -> list[float]:
    """Return the seconds from each kill to the next complete step without that rank.

    A kill that nobody noticed, since no step was left to make, has none.
    """
    every = sorted(line for lines in steps.values() for line in lines)
    found = []
    for number, killed in enumerate(kills):
        after = (when for when, _, size in every if when > killed and size < ranks - number)
        first = next(after, None)
        if first is not None:
            found.append(first - killed)
    return found


def unexplained(output: str) -> list[str]:
    """Return the lines that tell of something wrong, and that are not KNOWN."""
    return [
        f"it printed: {line}"
        for line in output.splitlines()
        if WRONG.search(line) and not any(re.search(known, line) for known in KNOWN)
    ]
