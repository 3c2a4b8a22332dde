"""What stands out in where the time of a training went, and what to do about it."""

from __future__ import annotations

from statistics import median
from typing import Any

from mpidl.clock import OTHER, PHASES

DATA_SHARE = 0.15
WAIT_SHARE = 0.15
REDUCE_SHARE = 0.25
LATE = 1.25  # times what the others compute
SHORT_SECONDS = 2e-3  # of computation in a step


def of(summary: dict[str, Any], config: dict[str, Any] | None = None) -> list[str]:
    """Return lines of advice, the most important first; none where nothing stands out.

    `summary` is what summary.json holds, `config` what config.json does, if it is known.
    """
    phases: dict[str, list[float]] = summary["phases"]
    ranks, steps, config = summary["ranks"], max(1, summary["steps"]), config or {}
    training = sum(sum(phases[name]) for name in PHASES[:OTHER])
    if not training:
        return []
    share = {name: sum(phases[name]) / training for name in PHASES[:OTHER]}
    found: list[tuple[float, str]] = []
    if share["data"] > DATA_SHARE:
        found.append((share["data"], _data(share["data"])))
    if ranks > 1:
        late = _straggler(phases, config)
        if late is not None:
            found.append(late)
        elif share["wait"] > WAIT_SHARE:
            told = "for one rank, then another: busy cores?"
            found.append((share["wait"], f"{share['wait']:.0%} of the time is waiting, {told}"))
        if share["reduce"] > REDUCE_SHARE:
            fixed = config.get("bucket_bytes", "auto") != "auto"
            found.append((share["reduce"], _reduce(share["reduce"], phases, steps, fixed=fixed)))
    cores, threads, here = (config.get(name) for name in ("cores", "threads", "ranks_on_node"))
    if cores and threads and here and threads * here > cores:
        text = f"{here} ranks with {threads} threads each fight for {cores} cores: "
        found.append((1.0, f"{text}OMP_NUM_THREADS={max(1, cores // here)}"))
    return [text for _, text in sorted(found, reverse=True)]


def _data(share: float) -> str:
    return f"{share:.0%} of the time is waiting for data: data.Loader(workers=2) helps"


def _straggler(phases: dict[str, list[float]], config: dict[str, Any]) -> tuple[float, str] | None:
    """Return what a rank that the others wait for costs, and the words; None where none is."""
    names = ("compute", "data", "update")
    busy = [sum(each) for each in zip(*(phases[name] for name in names), strict=True)]
    rank = max(range(len(busy)), key=busy.__getitem__)
    usual = median(busy[:rank] + busy[rank + 1 :])
    if busy[rank] < LATE * usual or not usual:
        return None
    why = max(names, key=lambda name: phases[name][rank] - median(phases[name]))
    hosts = config.get("hosts") or []
    where = f" on {hosts[rank]}" if rank < len(hosts) else ""
    text = f"rank {rank}{where} takes {busy[rank] / usual:.1f} x as long as the others ({why})"
    return 1 - usual / busy[rank], f"{text}"


def _reduce(share: float, phases: dict[str, list[float]], steps: int, *, fixed: bool) -> str:
    text = f"{share:.0%} of the time is averaging: "
    if sum(phases["compute"]) / len(phases["compute"]) / steps < SHORT_SECONDS:
        return text + "a larger batch per rank, or fewer ranks"
    if fixed:
        return text + 'bucket_bytes="auto" tries several sizes'
    return text + "overlap, a codec, or a larger batch per rank"
