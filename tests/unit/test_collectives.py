"""The parts of the engine that need no MPI: what is told, compared, counted and warned of."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from mpidl.collectives import Handle, Request
from mpidl.collectives import coordinator as coordinator_module
from mpidl.collectives import ids as ids_module
from mpidl.collectives.checks import some
from mpidl.collectives.coordinator import Answer, Coordinator
from mpidl.collectives.halves import Halves, shares
from mpidl.collectives.ids import IDS
from mpidl.collectives.known import Known
from mpidl.collectives.messages import pack, unpack
from mpidl.collectives.request import Item, describe
from mpidl.collectives.stall import Stall
from mpidl.collectives.sums import scale
from mpidl.collectives.timer import Timer
from mpidl.config import stall_seconds
from mpidl.errors import InvalidArgument, RankMismatch

NONE = np.empty(0, np.int32)


def item(name: str, size: int, shape: tuple[int, ...] = (2,), **options: Any) -> Item:
    request = Request(name, options.pop("kind", "allreduce"), np.ones(shape), **options)
    return Item(request.process_set, (name,), (describe(request, size),), request.group)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def agreed(coordinator: Coordinator, size: int, name: str) -> int:
    """The id of a name that has been used twice."""
    for _ in range(2):
        for rank in range(size):
            coordinator.submit(rank, NONE, [item(name, size)])
        (i,) = coordinator.answers()[0].ids.tolist()
    return int(i)


def names(answer: Answer, known: dict[int, str]) -> list[str]:
    """What an answer says to do; learns what new ids stand for."""
    if answer.extras is not None:
        known.update({i: found.names[0] for i, found in answer.extras.definitions})
    return [known[i] for i in answer.ids.tolist()]


def test_what_all_have_submitted_begins_in_one_order(rng: np.random.Generator) -> None:
    """First told in full, then by number; whatever the order and the batches."""
    size, count = 3, 20
    coordinator, known = Coordinator(size), dict[int, str]()
    number: dict[str, int] = {}
    for turn in range(5):
        waiting = {r: [f"x{i}" for i in rng.permutation(count)] for r in range(size)}
        done: list[str] = []
        while any(waiting.values()):
            rank = int(rng.integers(size))
            n = int(rng.integers(1, 8))
            batch, waiting[rank] = waiting[rank][:n], waiting[rank][n:]
            known_ids = [number[name] for name in batch if name in number]
            new = [item(name, size) for name in batch if name not in number]
            coordinator.submit(rank, np.array(known_ids, np.int32), new)
            answers = coordinator.answers()
            told = [names(answer, known) for answer in answers.values()]
            assert all(t == told[0] for t in told)
            assert set(answers) in (set(), {0, 1, 2})
            done += told[0] if told else []
            for name in done:
                assert all(name not in left for left in waiting.values())
        assert sorted(done) == sorted(f"x{i}" for i in range(count))
        number = {name: i for i, name in known.items() if i < IDS}
        assert len(number) == (count if turn else 0)
        assert not list(coordinator.waiting())


def test_a_process_set_is_told_alone_and_in_a_row() -> None:
    coordinator, known = Coordinator(3), dict[int, str]()
    for rank in range(3):
        kind = describe(Request("add", "barrier"), 3)._replace(
            kind="add_process_set", splits=(1, 2)
        )
        coordinator.submit(rank, NONE, [Item(0, ("add",), (kind,))])
    assert set(coordinator.answers()) == {0, 1, 2}
    assert coordinator.sets[1] == (1, 2)
    assert coordinator.listens  # rank 0 is not in it
    order = [item("a", 2, process_set=1), item("b", 3), item("c", 2, process_set=1), item("d", 3)]
    for rank in range(3):
        mine = [one for one in order if rank or not one.process_set]
        coordinator.submit(rank, NONE, mine)
    answers = coordinator.answers()
    assert names(answers[0], known) == ["b", "d"]
    assert names(answers[1], known) == names(answers[2], known) == ["b", "d", "a", "c"]
    for rank in (1, 2):
        coordinator.submit(rank, NONE, order[::2])
    ids_of_set = coordinator.answers()[1].ids
    assert ids_of_set.max() < IDS
    for rank in (1, 2):
        coordinator.submit(rank, ids_of_set, [])
    answers = coordinator.answers()
    assert set(answers) == {1, 2}
    assert answers[1].ids.tolist() == ids_of_set.tolist()


def test_a_number_and_words_for_one_name_meet() -> None:
    coordinator, known = Coordinator(2), dict[int, str]()
    i = agreed(coordinator, 2, "x")
    for first, second in ((0, 1), (1, 0)):  # who tells that it has changed
        coordinator.submit(first, ids(i), [])
        assert not coordinator.answers()
        coordinator.submit(second, NONE, [item("x", 2, (3,))])
        extras = coordinator.answers()[0].extras
        assert extras is not None
        ((keys, (kind, text)),) = extras.errors
        assert kind is RankMismatch
        assert keys == {0: [(0, "x")], 1: [(0, "x")]}
        shapes = {first: (2,), second: (3,)}
        assert text == f"'x': allreduce: shape: rank 0: {shapes[0]}; rank 1: {shapes[1]}"
    coordinator.submit(0, NONE, [item("x", 2, (3,))])
    coordinator.submit(1, NONE, [item("x", 2, (3,))])
    answer = coordinator.answers()[1]
    assert answer.ids.tolist() == [i]  # the same number, anew
    assert names(answer, known) == ["x"]
    for rank in range(2):
        coordinator.submit(rank, ids(i), [])
    assert coordinator.answers()[0].extras is None


def test_numbers_of_joined_ranks_are_not_waited_for() -> None:
    coordinator = Coordinator(3)
    i = agreed(coordinator, 3, "x")
    coordinator.submit(1, ids(i), [])
    coordinator.join(0)
    assert not coordinator.answers()
    coordinator.submit(2, ids(i), [])
    answers = coordinator.answers()
    assert all(answer.ids.tolist() != [i] for answer in answers.values())  # told to rank 0 in full
    assert answers[0].extras is not None
    assert [one.names for _, one in answers[0].extras.definitions] == [("x",)]
    coordinator.join(2)
    coordinator.join(1)
    extras = coordinator.answers()[1].extras
    assert extras is not None
    assert extras.joined == 1


FEW = 32  # ids; a 16th is retired at a time


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ids_module, coordinator_module):
        monkeypatch.setattr(module, "IDS", FEW)


def use(coordinator: Coordinator, size: int, numbers: Any, times: int = 1) -> Answer:
    """Submit names in full on all ranks, all in one batch."""
    for _ in range(times):
        for rank in range(size):
            coordinator.submit(rank, NONE, [item(f"{n}", size) for n in numbers])
        answer = coordinator.answers()[0]
    return answer


def test_names_that_are_used_once_fill_no_memory(few: None) -> None:
    coordinator, most = Coordinator(1), ids_module.REMEMBERED * FEW
    for start in range(0, most + 20, 10):
        assert use(coordinator, 1, range(start, start + 10)).ids.min() >= FEW
    assert len(coordinator._ids._without) == most
    assert agreed(coordinator, 1, "used twice") == 0
    assert agreed(coordinator, 1, "0") == 1  # it was forgotten, and counts anew


def test_more_names_than_ids_in_turns_keep_them(few: None) -> None:
    coordinator = Coordinator(1)
    before = use(coordinator, 1, range(FEW + 5), 2).ids.tolist()
    assert sorted(before[:FEW]) == list(range(FEW)) and min(before[FEW:]) >= FEW
    for _ in range(3):
        answer = use(coordinator, 1, range(FEW + 5))
        assert answer.ids.tolist()[:FEW] == before[:FEW]
        assert answer.extras is not None and answer.extras.retired == []


def test_names_that_come_no_more_give_their_ids_back(few: None) -> None:
    """The oldest first, and to new names when the last rank has forgotten them."""
    coordinator = Coordinator(2)
    old = dict(zip(range(FEW), use(coordinator, 2, range(FEW), 2).ids.tolist(), strict=True))
    use(coordinator, 2, range(0, FEW, 2))
    for rank in range(2):  # by numbers
        coordinator.submit(rank, ids(*(old[n] for n in range(2, FEW, 2))), [])
    coordinator.answers()
    extras = use(coordinator, 2, ["new", "newer"], 2).extras
    assert extras is not None and extras.retired == [old[1], old[3]]
    first, second = extras.retired
    coordinator.forget(0)
    assert use(coordinator, 2, ["new"]).ids.min() >= FEW
    coordinator.submit(0, NONE, [item("3", 2)])  # as the rank that knows, and the one that does not
    coordinator.submit(1, ids(second), [])
    answer = coordinator.answers()[0]
    assert answer.extras is not None
    ((i, found),) = answer.extras.definitions
    assert i >= FEW and found.names == ("3",) and answer.extras.errors == []
    coordinator.forget(1)
    given = use(coordinator, 2, ["new", "newer"]).ids.tolist()
    assert sorted(given) == sorted([first, second])
    for rank in range(2):
        coordinator.submit(rank, np.array(given, np.int32), [])
    assert coordinator.answers()[0].ids.tolist() == given


def test_closing_waits_for_ranks_that_forget(few: None) -> None:
    coordinator = Coordinator(2)
    use(coordinator, 2, range(FEW), 2)
    extras = use(coordinator, 2, ["new"], 2).extras
    assert extras is not None and len(extras.retired) == FEW // 16
    coordinator.close(0)
    coordinator.close(1)
    coordinator.forget(1)
    assert not coordinator.answers()
    coordinator.forget(0)
    last = coordinator.answers()[1].extras
    assert last is not None and last.closed


def test_a_joined_rank_takes_no_ids(few: None) -> None:
    coordinator = Coordinator(2)
    coordinator.join(1)
    for _ in range(3):
        coordinator.submit(0, NONE, [item(f"{n}", 2) for n in range(FEW)])
        assert coordinator.answers()[0].ids.min() >= FEW
    coordinator.join(0)
    coordinator.answers()
    assert sorted(use(coordinator, 2, range(FEW)).ids.tolist()) == list(range(FEW))
    use(coordinator, 2, ["new"], 2)


def test_a_retired_id_is_forgotten_when_what_has_it_is_done() -> None:
    request = Request("x", "allreduce", np.ones(2))
    key, handle = (0, "x"), Handle(request)
    in_flight = {key: handle}
    known = Known(in_flight)
    known.offered[key,] = "as it was"
    known.learn(3, item("x", 2))
    assert known.ids == {key: (3, "as it was")}
    known.retire({3, 4}, [key, (0, "y")])
    assert known.ids == {} and not known.forgot()
    in_flight[key] = Handle(request)  # it was done, and the next one is told in full
    assert known.forgot() and known.retired is None


def test_stall_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = Coordinator(4)
    stall = Stall(coordinator, 0.04)
    i = agreed(coordinator, 4, "known")
    coordinator.submit(2, ids(i), [])
    coordinator.submit(0, NONE, [item("new", 4)])
    coordinator.submit(3, NONE, [item("new", 4)])
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        stall.look()
        time.sleep(0.005)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("mpidl: allreduce 'known' waits for ranks 0, 1, 3 since")
    assert told[1].startswith("mpidl: allreduce 'new' waits for ranks 1, 2 since")
    assert told[1].endswith("submitted by ranks 0, 3")


@pytest.mark.parametrize(("value", "seconds"), [("", 60), ("0", 0), ("2.5", 2.5)])
def test_stall_seconds(value: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIDL_STALL_SECONDS", raising=False)
    if value:
        monkeypatch.setenv("MPIDL_STALL_SECONDS", value)
    assert stall_seconds() == seconds


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "inf"])
def test_wrong_stall_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_STALL_SECONDS", value)
    with pytest.raises(InvalidArgument, match="MPIDL_STALL_SECONDS"):
        stall_seconds()


def test_messages_come_back(rng: np.random.Generator) -> None:
    for n in (0, 1, 1000):
        numbers = rng.integers(0, IDS, n).astype(np.int32)
        for rest in (None, [item("x", 2), "join"]):
            found, other = unpack(bytearray(pack(numbers, rest)))
            np.testing.assert_array_equal(found, numbers)
            assert other == rest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_round_to_nearest_even(dtype: str, rng: np.random.Generator) -> None:
    values = (rng.standard_normal(40_000) * 10.0 ** rng.integers(-9, 6, 40_000)).astype(np.float32)
    values[:6] = [np.inf, -np.inf, 65519.996, 65520, -65520, 0]
    bits = np.empty(values.size, np.uint16)
    Halves().encode(values, bits, dtype)
    found = Halves().decode(bits, dtype)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        wide = values.view(np.uint32)
        wide = (wide + 0x7FFF + ((wide >> 16) & 1)) & np.uint32(0xFFFF0000)
        expected = wide.view(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_scale_truncates_integers() -> None:
    values = np.array([7, -7, 3, 0], np.int32)
    scale(values, 0.5)
    assert values.tolist() == [3, -3, 1, 0]


def test_shares_and_names() -> None:
    assert shares(7, 3) == [3, 2, 2]
    assert shares(0, 2) == [0, 0]
    assert some([3]) == "rank 3"
    assert some([2, 0]) == "ranks 0, 2"
    assert some(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."


def test_a_timer_is_set_anew() -> None:
    timer = Timer()
    timer.set(3600)
    timer.set(0.001)
    timer.sleep()  # or this test never ends
    timer.stop()
    timer.set(0.0)
    timer.sleep()
    timer.close()
