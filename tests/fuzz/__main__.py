"""Run in a child process, so that a crash of the interpreter is seen: one group, or several.

python -m tests.fuzz GROUP JOURNAL --seed 7 --examples 20    # random ones
python -m tests.fuzz GROUP JOURNAL --all                     # each hostile value in each place
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import importlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from tests.fuzz import calls, hostile, names

MEMORY_BYTES = 2 << 30  # beyond what is used at the start; what asks for more gets MemoryError


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--complete", action="store_true", help="compare the names with the tables")
    options = parser.parse_args()
    faulthandler.enable()
    modules = [importlib.import_module(f"tests.fuzz.tables.{g}") for g in options.group.split(",")]
    table, values = {}, dict(hostile.HOSTILE)
    for module in modules:
        table |= {name: make for name, make in module.TABLE.items() if options.only in name}
        values |= getattr(module, "HOSTILE", {})
    limit_memory()
    journal = calls.Journal(options.journal)
    failures = unknown(options.group.split(","), table) if options.complete else []
    check_valid(table, journal)
    if options.all:
        failures += every(table, values, journal)
    else:
        failures += some(table, hostile.drawn(values), journal, options)
    for failure in failures:
        print(failure)
    journal.note("")
    return bool(failures)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def unknown(groups: list[str], table: dict[str, Any]) -> list[str]:
    """Return what is public in adapters and in no table, and what is in one and not public."""
    public = {name for group in groups for name in names.of_group(group)}
    public = {name for name in public if not name.startswith("world:")}
    reasons = [r for r in names.INTERNAL_THERE if fnmatch.filter(public, r)]
    told = {name for reason in reasons for name in fnmatch.filter(public, reason)}
    return [
        *(f"{name}: expected it in a table" for name in sorted(public - set(table) - told)),
        *(f"{name}: is no longer public" for name in sorted(set(table) - public)),
    ]


def check_valid(table: dict[str, Callable[[], calls.Given]], journal: calls.Journal) -> None:
    """Make sure that each function takes what the table gives it, or the rest proves little."""
    for name, make in table.items():
        function, made = names.resolve(name), make()
        if made.refused:
            continue
        journal.note(f"{name} with valid arguments")
        try:
            with calls._quiet():
                result = function(*made.args, **made.options)
                calls._go_through(result if made.then is None else made.then(result))
        except Exception as error:
            raise AssertionError(f"{name} refuses what the table gives it") from error
        finally:
            made.close()


def some(
    table: dict[str, Callable[[], calls.Given]], values: Any, journal: calls.Journal, options: Any
) -> list[str]:
    """Replace one or two arguments of each function by drawn values, some times."""
    failures = []
    for number, (name, make) in enumerate(table.items()):
        made = make()
        places = st.sampled_from(calls.slots(made))
        made.close()
        changes = st.dictionaries(places, values, min_size=1, max_size=2)
        attempt = partial(calls.check, name, make, journal=journal)
        failures += failures_of(attempt, changes, options.seed + number, options.examples)
    return failures


def failures_of(
    attempt: Callable[[Any], None], changes: Any, seed: int, examples: int
) -> list[str]:
    """Attempt `examples` of `changes`; what fails is made small, and told."""
    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(changes)
    def test(found: Any) -> None:
        attempt(found)

    try:
        test()
    except Exception as error:  # of several kinds, a group of them
        return [str(one) for one in getattr(error, "exceptions", [error])]
    return []


def every(
    table: dict[str, Callable[[], calls.Given]],
    values: dict[str, Callable[[], Any]],
    journal: calls.Journal,
) -> list[str]:
    """Put each hostile value into each place, one at a time."""
    found: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for name, make in table.items():
        start = time.monotonic()
        made = make()
        places = calls.slots(made)
        made.close()
        for place in places:
            for item in values.items():
                begin = time.monotonic()
                try:
                    calls.check(name, make, {place: item}, journal)
                except calls.Escaped as error:
                    cause = error.__cause__
                    trace = cause.__traceback__ if cause else None
                    while trace is not None and trace.tb_next is not None:
                        if "/mpidl/" not in trace.tb_next.tb_frame.f_code.co_filename:
                            break
                        trace = trace.tb_next
                    where = trace and f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
                    kind = f"{name}[{place}] {type(cause).__name__} {where}"
                    found[kind] += 1
                    texts.setdefault(kind, str(error))
                if time.monotonic() - begin > 1:
                    print(
                        f"slow: {name} {place}={item[0]}: {time.monotonic() - begin:.1f} s",
                        file=sys.stderr,
                    )
        print(f"{time.monotonic() - start:.1f} s {name}", file=sys.stderr)
    return [f"{count} x {texts[kind][:300]}\n    at {kind}" for kind, count in found.items()]


if __name__ == "__main__":
    sys.exit(main())
