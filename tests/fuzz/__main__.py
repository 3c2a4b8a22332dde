"""Run in a child process, so that a crash of the interpreter is seen: one group of functions.

python -m tests.fuzz GROUP JOURNAL --seed 7 --examples 20    # random ones
python -m tests.fuzz GROUP JOURNAL --all                     # each hostile value in each place
"""

from __future__ import annotations

import argparse
import faulthandler
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

from tests.fuzz import calls, hostile

MEMORY_BYTES = 2 << 30  # beyond what is used at the start; what asks for more gets MemoryError


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("journal", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    faulthandler.enable()
    table = importlib.import_module(f"tests.fuzz.tables.{options.group}").TABLE
    table = {name: make for name, make in table.items() if options.only in name}
    limit_memory()
    journal = calls.Journal(options.journal)
    check_valid(table, journal)
    failures = every(table, journal) if options.all else some(table, journal, options)
    for failure in failures:
        print(failure)
    journal.note("")
    return bool(failures)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def check_valid(table: dict[str, Callable[[], calls.Given]], journal: calls.Journal) -> None:
    """Make sure that each function takes what the table gives it, or the rest proves little."""
    for name, make in table.items():
        function, made = calls.names.resolve(name), make()
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
    table: dict[str, Callable[[], calls.Given]], journal: calls.Journal, options: Any
) -> list[str]:
    """Replace one or two arguments of each function by drawn values, some times."""
    failures = []
    for number, (name, make) in enumerate(table.items()):
        made = make()
        places = st.sampled_from(calls.slots(made))
        made.close()
        changes = st.dictionaries(places, hostile.VALUES, min_size=1, max_size=2)
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


def every(table: dict[str, Callable[[], calls.Given]], journal: calls.Journal) -> list[str]:
    """Put each hostile value into each place, one at a time."""
    found: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for name, make in table.items():
        start = time.monotonic()
        made = make()
        places = calls.slots(made)
        made.close()
        for place in places:
            for item in hostile.HOSTILE.items():
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
