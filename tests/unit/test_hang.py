"""What is told of a job that has come to a halt, and when it is to end; and what marks hold."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from mpidl import config, marks
from mpidl.errors import InvalidArgument, RankMismatch
from mpidl.hang import LATE, Halt, Place, State, Wait
from mpidl.marks import Mark

if TYPE_CHECKING:
    import numpy as np

LIMIT = 60.0
HERE = [Place("a", 11), Place("a", 12), Place("b", 21), Place("b", 22)]
PLACES = dict(enumerate(HERE))


def waits(call: str = "barrier", seconds: float = 61, number: int = 7, **more: Any) -> State:
    return State((Wait(call, number, seconds, **{"ranks": None, **more}),), 7, "train.py:12")


BUSY = State((), 6, "train.py:9", ("train.py:3 in main", "train.py:9 in load: sleep(9)"))


def test_the_report_tells_who_waits_where_and_for_whom() -> None:
    halt = Halt({0: waits(), 1: BUSY, 2: waits(seconds=64)}, {3: "it is stopped"}, LIMIT)
    assert halt.report(PLACES, ends=True) == (
        "mpidl: ranks 0, 2 have waited for 64 s\n"
        "  ranks 0, 2: in barrier at train.py:12, its call 7\n"
        "  rank 1 on a (process 12): is elsewhere, after 6 calls\n"
        "    train.py:3 in main\n"
        "    train.py:9 in load: sleep(9)\n"
        "  rank 3 on b (process 22): does not answer: it is stopped\n"
        "  the job is ended after 600 s; MPIDL_STALL_SECONDS and MPIDL_STALL=warn change that\n"
    )
    assert halt.report(PLACES, ends=False).endswith("it goes on, as MPIDL_STALL=warn asks\n")
    unasked = Halt({0: waits()}, {1: ""}, LIMIT, asked=False).report(PLACES, ends=True)
    assert "  rank 1 on a (process 12): cannot be asked, without MPI_THREAD_MULTIPLE\n" in unasked


def test_ranks_of_one_stack_are_told_together() -> None:
    states: dict[int, State] = dict.fromkeys(range(1, 100), BUSY) | {0: waits()}
    places = {rank: Place(f"host{rank}", rank) for rank in states}
    report = Halt(states, {}, LIMIT).report(places, ends=True)
    assert "mpidl: rank 0 has waited for 61 s\n" in report
    assert (
        "  ranks 1, 2, 3, 4, 5, 6, 7, 8, ... on host1 (process 1), on host2 (process 2), ...: is"
    ) in report
    assert len(report.splitlines()) == 6


def test_a_report_stays_short_whatever_the_ranks_do() -> None:
    states = {r: State((), r, "", (f"train.py:{r}",)) for r in range(1, 100)} | {0: waits()}
    report = Halt(states, {}, LIMIT).report(dict.fromkeys(states, Place("a", 1)), ends=True)
    assert "and 91 more kinds of ranks" in report
    assert len(report.splitlines()) < 25


def test_ranks_in_different_calls_are_told_what_finds_out() -> None:
    halt = Halt({0: waits(), 1: waits("gather", number=8)}, {}, LIMIT)
    report = halt.report(PLACES, ends=True)
    assert "  rank 0: in barrier at train.py:12, its call 7\n" in report
    assert "  rank 1: in gather at train.py:12, its call 8\n" in report
    assert "MPIDL_CHECK=collectives" in report
    same = Halt({0: waits(), 1: waits()}, {}, LIMIT).report(PLACES, ends=True)
    assert "MPIDL_CHECK" not in same


@pytest.mark.parametrize(
    ("other", "silent", "patience"),
    [
        (State(ended=True), None, LIMIT),  # it will never come
        (waits(), None, 2 * LIMIT),  # nobody is missing
        (None, "it is stopped", 2 * LIMIT),
        (None, "", LATE * LIMIT),  # its interpreter may be held by other code
        (BUSY, None, LATE * LIMIT),
    ],
)
def test_the_end_comes_sooner_where_there_is_less_hope(
    other: State | None, silent: str | None, patience: float
) -> None:
    states = {0: waits(), 2: waits()} | ({} if other is None else {1: other})
    assert Halt(states, {} if silent is None else {1: silent}, LIMIT).patience == patience


def test_a_group_waits_for_its_own_ranks_only() -> None:
    halt = Halt({0: waits(ranks=(0, 2)), 1: BUSY, 2: BUSY}, {3: ""}, LIMIT)
    assert halt.awaited == {2}
    assert "rank 1" not in halt.report(PLACES, ends=True)
    ended = Halt({0: waits(ranks=(0, 2)), 1: State(ended=True), 2: BUSY, 3: BUSY}, {}, LIMIT)
    assert ended.patience == LATE * LIMIT


def test_a_person_who_looks_at_a_rank_is_left_alone() -> None:
    assert Halt({0: waits(), 1: State(debugged=True)}, {}, LIMIT).debugged
    assert Halt({0: waits()}, {1: "in a debugger"}, LIMIT).debugged
    assert not Halt({0: waits(), 1: BUSY}, {2: ""}, LIMIT).debugged


def test_marks_tell_the_calls_within_calls() -> None:
    mark = Mark()
    assert mark.told() == ""
    with mark.enter("step {}", (3,)):
        mark.at("bucket {} of step {}", (1, 3))
        with mark.enter("gather"):
            assert mark.told() == "bucket 1 of step 3: gather"
        with pytest.raises(ZeroDivisionError), mark.enter("gather"):
            raise ZeroDivisionError
        assert mark.told() == "bucket 1 of step 3"
        with mark.note("wait"):
            assert mark.told() == "bucket 1 of step 3: wait"
    assert (mark.told(), mark.calls, mark.progress) == ("", 3, 1)
    mark.at("nothing")
    assert mark.told() == ""


class Comm:
    """What the other ranks say."""

    size = 3

    def __init__(self, others: list[tuple[str, str]]) -> None:
        self.others = others

    def allgather(self, mine: tuple[str, str]) -> list[tuple[str, str]]:
        return [mine, *self.others]


def test_different_calls_are_told_by_rank() -> None:
    mark = Mark(Comm([("barrier", "a.py:1"), ("gather", "a.py:2")]), checks=True)
    line = sys._getframe().f_lineno + 2
    with pytest.raises(RankMismatch) as caught:
        mark.enter("barrier")
    assert caught.value.collective
    assert str(caught.value) == (
        f"the ranks make different calls: rank 0: barrier at {__file__}:{line}; "
        "rank 1: barrier at a.py:1; rank 2: gather at a.py:2"
    )
    assert mark.told() == ""
    with Mark(Comm([("barrier", "b.py:1")] * 2), checks=True).enter("barrier"):
        pass


def deep(levels: int) -> list[str]:
    return deep(levels - 1) if levels else marks.stack(sys._getframe())


def test_a_long_stack_is_cut_in_its_outer_half(rng: np.random.Generator) -> None:
    levels = int(rng.integers(20, 40))
    lines = deep(levels)
    assert len(lines) == marks.STACK_LINES
    assert lines[2].startswith("... ")
    assert all(f"{__file__}:" in line and " in deep: " in line for line in lines[3:])


def test_the_site_is_where_the_user_calls() -> None:
    def callback() -> str:
        return marks.site(sys._getframe())

    assert callback().startswith(f"{__file__}:")
    frame: FrameType | None = None

    class Frame(Comm):
        def allgather(self, mine: tuple[str, str]) -> list[tuple[str, str]]:
            nonlocal frame
            frame = sys._getframe(1)  # in mpidl/marks.py
            return [mine]

    Mark(Frame([]), checks=True).enter("barrier")
    assert marks.site(frame).startswith(f"{__file__}:")
    assert marks.site(None) == "the end of the script"


def test_a_debugger_is_seen_in_the_stack() -> None:
    found: list[bool] = []
    names = {"__name__": "pdb", "look": lambda: found.append(marks.in_debugger(sys._getframe()))}
    exec("look()", names)
    names["look"]()
    assert found == [True, False]


def test_all_marks_are_found_from_any_thread() -> None:
    mark = Mark()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(mark in marks.everywhere()))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("name", "read", "values"),
    [
        ("MPIDL_STALL", config.stall, ("abort", "warn")),
        ("MPIDL_CHECK", config.check, ("nothing", "collectives")),
    ],
)
def test_settings(name: str, read: Any, values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert read() == values[0]
    monkeypatch.setenv(name, values[1])
    assert read() == values[1]
    assert read(values[0]) == values[0]
    for asked, value in ((None, "Warn"), ("no", values[0])):
        monkeypatch.setenv(name, value)
        with pytest.raises(InvalidArgument, match=f"{name}='{asked or value}': expected one of"):
            read(asked)
