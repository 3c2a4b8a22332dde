"""The clock of phases: times are set by the tests."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mpidl import clock
from mpidl.clock import COMPUTE, DATA, OTHER, REDUCE, UPDATE, WAIT


class Heard:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def interval(self, phase: int, begin: float, end: float) -> None:
        self.told.append((clock.PHASES[phase], begin, end))

    def split(self, begin: float, end: float, seconds: Any) -> None:
        self.told.append(("split", begin, end, seconds))

    def step(self, number: int, end: float) -> None:
        self.told.append(("step", number, end))


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands at 0 s until a test sets `now`; the clock is as at the start, in OTHER."""
    made = SimpleNamespace(now=0.0)
    monkeypatch.setattr(clock, "perf_counter", lambda: made.now)
    for name, value in {
        "seconds": [0.0] * 6,
        "_at_step": [0.0] * 6,
        "_phase": OTHER,
        "_since": 0.0,
        "_thread": threading.get_ident(),
        "_folded": 0,
        "listener": None,
        "history": None,
    }.items():
        monkeypatch.setattr(clock, name, value)
    return made


@pytest.fixture
def heard(time: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Heard:
    made = Heard()
    monkeypatch.setattr(clock, "listener", made)
    return made


def test_each_second_is_that_of_one_phase(time: SimpleNamespace) -> None:
    time.now = 1.0
    assert clock.switch(COMPUTE) == OTHER
    time.now = 3.0
    assert clock.switch(WAIT) == COMPUTE
    time.now = 3.5
    assert clock.switch(COMPUTE) == WAIT
    time.now = 4.5
    assert clock.read() == [3.0, 0.0, 0.5, 0.0, 0.0, 1.0]
    assert sum(clock.read()) == time.now


def test_other_threads_do_not_count(time: SimpleNamespace) -> None:
    clock.switch(COMPUTE)
    thread = threading.Thread(target=lambda: clock.switch(REDUCE))
    thread.start()
    thread.join()
    time.now = 2.0
    assert clock.read()[COMPUTE] == 2.0


def test_a_thread_that_trains_has_the_clock(time: SimpleNamespace) -> None:
    def train() -> None:
        clock.take_thread()
        clock.switch(COMPUTE)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    clock.switch(DATA)  # no more this thread's
    time.now = 1.0
    assert clock.read()[COMPUTE] == 1.0


def test_a_thread_that_is_waited_for_may_have_the_clock(time: SimpleNamespace) -> None:
    def backward() -> None:
        with clock.lent():
            clock.switch(REDUCE)
            time.now += 2.0
            clock.switch(COMPUTE)

    clock.switch(COMPUTE)
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    time.now += 1.0
    clock.switch(OTHER)
    assert clock.seconds == [1.0, 0.0, 0.0, 2.0, 0.0, 0.0]


def test_calls_and_batches(time: SimpleNamespace) -> None:
    @clock.counted(WAIT)
    def wait(*, fails: bool = False) -> None:
        time.now += 2.0
        if fails:
            raise ValueError("as asked")

    def items() -> Any:
        for i in range(2):
            time.now += 1.0
            yield i

    clock.switch(COMPUTE)
    for _ in clock.fetched(items()):
        time.now += 5.0
        wait()
    with pytest.raises(ValueError, match="as asked"):
        wait(fails=True)
    assert clock.read() == [10.0, 2.0, 6.0, 0.0, 0.0, 0.0]


def test_steps_are_kept_and_told(time: SimpleNamespace, heard: Heard) -> None:
    rows: list[list[float]] = []
    clock.switch(COMPUTE)
    clock.record(rows)
    for number in (7, 8):
        time.now += 1.0
        clock.switch(UPDATE)
        time.now += 0.25
        clock.step(number)
        clock.switch(COMPUTE)
    clock.record(None)
    clock.step(9)
    assert rows == [[1.0, 0.0, 0.0, 0.0, 0.25, 0.0]] * 2
    steps = [told for told in heard.told if told[0] == "step"]
    assert steps == [("step", 7, 1.25), ("step", 8, 2.5), ("step", 9, 2.5)]
    assert heard.told[2:4] == [("step", 7, 1.25), ("update", 1.0, 1.25)]


def test_what_changes_quickly_is_told_as_a_whole(time: SimpleNamespace, heard: Heard) -> None:
    clock.switch(COMPUTE)
    time.now = 1.0
    with clock.folded():
        for phase in (REDUCE, UPDATE) * 3:
            clock.switch(phase)
            time.now += 0.5
        clock.switch(COMPUTE)
    time.now = 5.0
    clock.switch(OTHER)
    assert heard.told[1:] == [
        ("compute", 0.0, 1.0),
        ("split", 1.0, 4.0, [0.0, 0.0, 0.0, 1.5, 1.5, 0.0]),
        ("compute", 4.0, 5.0),
    ]
    assert clock.seconds == [2.0, 0.0, 0.0, 1.5, 1.5, 0.0]
