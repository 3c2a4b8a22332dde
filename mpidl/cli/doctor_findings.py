"""What `mpidl doctor --hosts` makes of what it has found on the hosts, and between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from mpidl.cli.told import wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Facts = Mapping[str, Mapping[str, Any]]  # by host

OK, WARNING, PROBLEM = "ok", "warning", "problem"
NAMES = 3  # of hosts, in a line
LEAST_SHARED_MEMORY = 1 << 30  # free bytes; containers have 64 MiB by default
LEAST_OPEN_FILES = 1024
MOST_CLOCK_SECONDS = 1.0
MOST_LATENCY_SECONDS = 1e-3
LEAST_RATE = 0.9e9  # bits a second
SLOW = 0.5  # of the others' bandwidth
LATE = 10  # times the others' latency, and beyond LATE_SECONDS
LATE_SECONDS = 2e-4
SLOW_ALLREDUCE = 3.0  # times what the wire takes
USED = 0.1  # of a host's traffic
SAME = (  # what is compared; how bad it is where it differs; what to do
    ("python", "Python", PROBLEM, "the same environment on all hosts: a shared file system"),
    ("mpidl", "mpidl", PROBLEM, "pip install the same mpidl there"),
    ("mpi", "MPI", PROBLEM, "load the same MPI there: module load, or MPI4PY_LIBMPI"),
    ("cores", "cores", WARNING, "ranks as each host has cores: --hosts a:8,b:4"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was found, and where it is not well, what to do."""

    state: str  #: "ok", "warning" or "problem"
    text: str
    next: str = ""

    @property
    def lines(self) -> str:
        """What a person reads, in 80 columns."""
        told = wrapped(self.text, f"{self.state:<8}", " " * 8)
        return f"{told}\n{wrapped(f'next: {self.next}', ' ' * 8, ' ' * 14)}" if self.next else told


def of_hosts(facts: Facts, failed: Mapping[str, tuple[str, str]]) -> list[Finding]:
    """Judge what was found on each host, and those that `failed`: why, and what to do."""
    found = [Finding(PROBLEM, f"{name}: {why}", then) for name, (why, then) in failed.items()]
    if not facts:
        return found
    number = len(facts)
    if not failed:
        found.append(Finding(OK, f"reach: {number} hosts, without a password"))
    for key, label, state, then in SAME:
        found += _same(facts, label, state, then, lambda one, key=key: one[key])  # type: ignore[misc]
    found += _packages(facts)
    found += _shared_memory(facts)
    found += _limits(facts)
    return [*found, *_gpus(facts)]


def of_network(hosts: Sequence[str], facts: Facts, measured: Mapping[str, Any]) -> list[Finding]:
    """Judge what ranks on `hosts`, in this order, have measured."""
    pairs = [(hosts[a], hosts[b], latency, rate) for a, b, latency, rate in measured["pairs"]]
    return [
        *_clocks(hosts, measured["clocks"]),
        *_latency(pairs),
        *_bandwidth(pairs, measured["left"]),
        *_allreduce(measured["allreduce"]),
        *_interfaces(hosts, facts, measured),
    ]


def several(names: Sequence[str]) -> str:
    """Return names of hosts, of many the first ones and how many more."""
    if len(names) <= NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES])} and {len(names) - NAMES} more"


def _same(
    facts: Facts, label: str, state: str, then: str, value: Callable[[Mapping[str, Any]], object]
) -> Iterator[Finding]:
    found = {name: value(one) for name, one in facts.items()}
    usual = Counter(found.values()).most_common(1)[0][0]
    others: dict[object, list[str]] = {}
    for name, one in found.items():
        if one != usual:
            others.setdefault(one, []).append(name)
    if not others:
        yield Finding(OK, f"{label}: {_told(usual)} everywhere")
    first = next(name for name, one in found.items() if one == usual)
    for one, names in others.items():
        yield Finding(
            state, f"{label}: {several(names)}: {_told(one)}, {first}: {_told(usual)}", then
        )


def _told(value: object) -> str:
    return "none" if value is None else str(value)


def _packages(facts: Facts) -> Iterator[Finding]:
    names = list(dict.fromkeys(name for one in facts.values() for name in one["packages"]))
    bad: list[Finding] = []
    for name in names:
        then = f"pip install the same {name} there"
        found = _same(facts, name, WARNING, then, lambda one, name=name: one["packages"].get(name))  # type: ignore[misc]
        bad += [finding for finding in found if finding.state != OK]
    if not bad:
        one = next(iter(facts.values()))["packages"]
        text = ", ".join(f"{name} {one[name]}" for name in names)
        bad.append(Finding(OK, f"packages alike: {text or 'none'}"))
    yield from bad


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    least: dict[str, int] = {}
    for name, one in facts.items():
        memory = one["shared_memory"]
        if memory is None:
            yield Finding(WARNING, f"{name}: no /dev/shm", "mount a tmpfs on /dev/shm")
        elif memory["free"] < LEAST_SHARED_MEMORY:
            yield Finding(
                WARNING,
                f"{name}: {_size(memory['free'])} of {_size(memory['size'])} free in /dev/shm",
                "containers: --shm-size=8g; else remove what old jobs left there",
            )
        else:
            least[name] = memory["free"]
    if least:
        yield Finding(OK, f"/dev/shm: {_size(min(least.values()))} free, or more")


def _limits(facts: Facts) -> Iterator[Finding]:
    files = {n: one["open_files"] for n, one in facts.items() if one["open_files"] is not None}
    few = [name for name, limit in files.items() if limit < LEAST_OPEN_FILES]
    if few:
        text = f"{several(few)}: at most {files[few[0]]} open files"
        yield Finding(WARNING, text, f"ulimit -n {4 * LEAST_OPEN_FILES}, or limits.conf(5)")
    else:
        yield Finding(OK, f"open files: {min(files.values(), default='no limit')} at most")
    locked = {n: one["locked_memory"] for n, one in facts.items() if one["locked_memory"]}
    short = [name for name in locked if facts[name]["rdma"]]
    if short:
        text = f"{several(short)}: locked memory is {_size(locked[short[0]])}, and there is RDMA"
        yield Finding(WARNING, text, "ulimit -l unlimited, or limits.conf(5): memlock")
    else:
        most = _size(min(locked.values())) if locked else "no limit"
        yield Finding(OK, f"locked memory: {most} (counts for RDMA only)")


def _gpus(facts: Facts) -> Iterator[Finding]:
    counts: dict[str, int] = {}
    for name, one in facts.items():
        gpus = one["gpus"]
        if gpus is None:
            counts[name] = 0
        elif isinstance(gpus, str):
            text = f"{name}: a driver, but no GPU for CuPy: {gpus}"
            yield Finding(WARNING, text, "pip install 'mpidl[cuda12]' there, or 'mpidl[cuda13]'")
        else:
            counts[name] = len(gpus["names"])
            for a, b in gpus["apart"][:1]:
                text = f"{name}: GPUs {a} and {b} cannot read each other's memory"
                more = len(gpus["apart"]) - 1
                text += f", and {more} more pairs" if more else ""
                yield Finding(WARNING, text, "nvidia-smi topo -p2p r tells why; NVLink, IOMMU")
    if not any(counts.values()):
        yield Finding(OK, "GPUs: no GPU")
    else:
        told = {name: {"gpus": count} for name, count in counts.items()}
        then = "hosts with as many GPUs, or ranks as each has: --hosts a:8,b:4"
        yield from _same(told, "GPUs", WARNING, then, lambda one: one["gpus"])


def _clocks(hosts: Sequence[str], clocks: Sequence[Sequence[float]]) -> Iterator[Finding]:
    wrong = False
    for name, (ahead, uncertainty) in zip(hosts, clocks, strict=True):
        if abs(ahead) - uncertainty > MOST_CLOCK_SECONDS:
            wrong = True
            way = "ahead of" if ahead > 0 else "behind"
            text = f"{name}: its clock is {abs(ahead):.3g} s {way} {hosts[0]}'s"
            yield Finding(WARNING, f"{text} (+-{uncertainty:.2g} s)", "chronyd or ntpd there")
    if not wrong and len(clocks) > 1:
        ahead, uncertainty = max(clocks, key=lambda one: abs(one[0]))
        text = f"clocks: at most {_time(abs(ahead))} apart (+-{_time(uncertainty)})"
        yield Finding(OK, text)


Pairs = list[tuple[str, str, float, float]]


def _latency(pairs: Pairs) -> Iterator[Finding]:
    if not pairs:
        return
    usual = median(pair[2] for pair in pairs)
    most = max(LATE * usual, LATE_SECONDS) if len(pairs) > 2 else MOST_LATENCY_SECONDS
    most = min(most, max(MOST_LATENCY_SECONDS, 2 * usual))
    late = [pair for pair in pairs if pair[2] > most]
    then = "is it the interface, or the network, that MPI should use? See below"
    for a, b, latency, _ in late[:NAMES]:
        yield Finding(WARNING, f"{a} - {b}: {_time(latency)} for 8 bytes", then)
    if not late and usual > MOST_LATENCY_SECONDS:
        yield Finding(WARNING, f"latency: {_time(usual)} for 8 bytes, in the median", then)
    elif not late:
        text = f"latency: {_time(min(p[2] for p in pairs))} to {_time(max(p[2] for p in pairs))}"
        yield Finding(OK, f"{text} for 8 bytes, {len(pairs)} pairs")


def _bandwidth(pairs: Pairs, left: int) -> Iterator[Finding]:
    """A host whose best pair is slow is slow itself; else it is the way between two of them."""
    if not pairs:
        return
    best: dict[str, float] = {}
    for a, b, _, rate in pairs:
        best[a], best[b] = max(best.get(a, 0), rate), max(best.get(b, 0), rate)
    usual = median(best.values())
    slow = [name for name, rate in best.items() if rate < SLOW * usual]
    rest = [pair for pair in pairs if not {pair[0], pair[1]} & set(slow)]
    for name in slow:
        text = f"{name}: {_rate(best[name])} at best, the others {_rate(usual)}"
        yield Finding(WARNING, text, f"ethtool on {name}: cable, port, other jobs; or leave it out")
    between = median([pair[3] for pair in rest] or [0.0])
    narrow = sorted((p for p in rest if p[3] < SLOW * between), key=lambda pair: pair[3])
    for a, b, _, rate in narrow[:NAMES]:
        text = f"{a} - {b}: {_rate(rate)}, other pairs {_rate(between)}"
        yield Finding(WARNING, text, "the switches between them; hosts of one rack")
    if len(narrow) > NAMES:
        yield Finding(WARNING, f"{len(narrow) - NAMES} more pairs are slow", "see --json")
    text = f"{_rate(min(pair[3] for pair in pairs))} to {_rate(max(pair[3] for pair in pairs))}"
    text += f", {len(pairs)} pairs" + (f"; {left} not measured in time" if left else "")
    if between and between < LEAST_RATE:
        then = "a faster network, or codecs and local SGD: mpidl plan tells what they gain"
        yield Finding(WARNING, f"bandwidth: {text}", then)
    elif not slow and not narrow:
        yield Finding(OK, f"bandwidth: {text}")


def _allreduce(found: Mapping[str, float]) -> Iterator[Finding]:
    ratio = found["seconds"] / found["wire_seconds"] if found["wire_seconds"] else 0.0
    text = f"allreduce: {_size(found['bytes'])} in {_time(found['seconds'])}, {ratio:.1f} times"
    if ratio > SLOW_ALLREDUCE:
        then = "mpidl bench allreduce --hosts compares strategies with MPI's own"
        yield Finding(WARNING, f"{text} the slowest wire's", then)
    elif ratio:
        yield Finding(OK, f"{text} the slowest wire's")


def _interfaces(
    hosts: Sequence[str], facts: Facts, measured: Mapping[str, Any]
) -> Iterator[Finding]:
    used: dict[str, list[str]] = {}
    for name, traffic, moved in zip(hosts, measured["traffic"], measured["moved"], strict=True):
        total = sum(traffic.values())
        chosen = [one for one, count in traffic.items() if count > USED * total]
        if total < moved / 2:
            chosen = []  # it went another way, and what there is is somebody else's
        used.setdefault(", ".join(sorted(chosen)) or "none that the kernel counts", []).append(name)
        speeds = facts.get(name, {}).get("interfaces", {})
        fastest = max(speeds, key=speeds.__getitem__, default=None)
        mine = [speeds[one] for one in chosen if one in speeds]
        if fastest is not None and mine and speeds[fastest] > max(mine):
            text = f"{name}: MPI used {', '.join(chosen)}, {fastest} is faster"
            then = (
                f"OMPI_MCA_btl_tcp_if_include={fastest}, mpiexec -iface {fastest}, UCX_NET_DEVICES"
            )
            yield Finding(WARNING, text, then)
    for interfaces, names in used.items():
        where = "everywhere" if len(used) == 1 else f"on {several(names)}"
        yield Finding(OK, f"interfaces that MPI uses: {interfaces} {where}")


def _rate(value: float) -> str:
    return f"{value / 1e9:.2f} Gbit/s" if value >= 1e8 else f"{value / 1e6:.1f} Mbit/s"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
