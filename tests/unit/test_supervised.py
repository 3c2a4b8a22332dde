"""Supervised runs: leases, what ranks may say, and what an attempt comes to. No MPI."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from mpidl import config, supervised
from mpidl.cli import places
from mpidl.cli.listener import Listener, Member
from mpidl.cli.verdict import (
    DEATH_SECONDS,
    START_SECONDS,
    Vain,
    Verdict,
    completed,
)
from mpidl.errors import InvalidArgument
from mpidl.lease import LATE_SECONDS, Lease, clock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "a" * 32


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while Rank.made:
        Rank.made.pop().link.close()


# --- leases


def test_an_answer_counts_from_when_it_was_asked_for(rng: np.random.Generator) -> None:
    start, seconds = float(rng.uniform(0, 1e6)), float(rng.uniform(2, 9))
    lease = Lease(seconds, start)
    assert lease.until == start + seconds
    first, second = lease.ask(start + 1), lease.ask(start + 2)
    lease.answer(second)
    assert lease.until == start + 2 + seconds
    lease.answer(first)  # a late one
    lease.answer(second)
    lease.answer(second + 5)  # to what was never asked
    assert lease.until == start + 2 + seconds


def test_without_an_answer_it_ends() -> None:
    lease = Lease(5, 100.0)
    assert [lease.look(100.0 + t) for t in np.arange(0, 5, 0.5)] == [True] * 10
    assert not lease.look(105.0)


def test_who_did_not_run_may_ask_anew() -> None:
    lease = Lease(5, 100.0)
    late = 105.0 + LATE_SECONDS
    assert lease.look(late) and late >= lease.until  # it lives on, but may not write
    number = lease.ask(late)
    assert lease.look(late + 1)
    lease.answer(number)
    assert lease.until == late + 5


def test_and_ends_where_no_answer_comes() -> None:
    lease = Lease(5, 100.0)
    looks = [lease.look(200.0 + t) for t in np.arange(0, 6, 0.5)]
    assert looks == [True] * 10 + [False] * 2


def test_without_a_supervisor_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIDL_SUPERVISOR", raising=False)
    supervised.start()
    supervised.check_lease()
    supervised.tell_size(3)
    assert supervised._keeper is None


# --- settings


def test_where_the_supervisor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_SUPERVISOR", f"4711,{TOKEN},10.0.0.1,fe80::1")
    monkeypatch.setenv("MPIDL_ATTEMPT", "2")
    found = config.supervisor()
    assert found == config.Supervisor(4711, TOKEN, ("10.0.0.1", "fe80::1"), 2)
    assert TOKEN not in repr(found)
    assert config.supervisor() is None  # what this process starts is no rank


@pytest.mark.parametrize("value", ["x,y,z", "4711", "4711,t", "4711,t,", "70000,t,a", "-1,t,a"])
def test_where_it_cannot_be(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_SUPERVISOR", value)
    monkeypatch.setenv("MPIDL_ATTEMPT", "0")
    with pytest.raises(InvalidArgument, match="mpidl run --restarts"):
        config.supervisor()


@pytest.mark.parametrize("name", ["MPIDL_LEASE_SECONDS", "MPIDL_SILENT_SECONDS"])
@pytest.mark.parametrize("value", ["", "nan", "inf", "0.5", "-1", "soon"])
def test_seconds(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    ask = {"MPIDL_LEASE_SECONDS": config.lease_seconds}.get(name, config.silent_seconds)
    with pytest.raises(InvalidArgument, match=name):
        ask()
    monkeypatch.delenv(name)
    assert ask() in (5, 6)


# --- the port


class Rank:
    """A connection to a listener; `say` sends, `answers` returns what comes within a moment."""

    made: ClassVar[list[Rank]] = []

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.link = socket.create_connection(("127.0.0.1", listener.port), 5)
        Rank.made.append(self)

    def say(self, *messages: Any) -> list[dict[str, Any]] | None:
        for message in messages:
            text = message if isinstance(message, bytes) else json.dumps(message).encode()
            try:
                self.link.sendall(text + b"\n")
            except OSError:
                return None
        return self.answers()

    def answers(self) -> list[dict[str, Any]] | None:
        """Return what has come; None where the connection was closed."""
        end = time.monotonic() + 0.15
        while time.monotonic() < end:
            self.listener.look(0.01)
        self.link.setblocking(False)
        try:
            found = self.link.recv(65536)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        return [json.loads(line) for line in found.splitlines()] if found else None


def hello(token: str = TOKEN, attempt: int = 0, rank: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "token": token,
        "attempt": attempt,
        "rank": rank,
        "host": "here",
        "process": 7,
        **other,
    }


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener(TOKEN, everywhere=False, most=6)
    made.begin(0)
    yield made
    made.close()


def test_a_rank_that_reports(listener: Listener) -> None:
    rank = Rank(listener)
    assert rank.say(hello(rank=3)) == [{"welcome": 1}]
    assert rank.say({"size": 2}, {"ping": 1, "steps": 8}) == [{"answer": 1}]
    (member,) = listener.members
    assert (member.rank, member.host, member.size, member.steps) == (3, "here", 2, 8)
    assert member.lives
    assert rank.say({"ended": 75}) == [{"noted": 1}]
    assert member.status == 75 and not member.lives
    rank.link.close()
    listener.look(0.2)
    assert member.closed == "closed"


STRANGE = [
    hello(token="b" * 32),
    hello(token=""),
    hello(token=TOKEN + "a"),
    hello(token="\udcff"),
    {**hello(), "token": 5},
    {**hello(), "token": [TOKEN]},
    {"ping": 1},
    {"attempt": 0},
    hello(attempt=-1),
    hello(attempt=0.0),
    hello(attempt=True),
    hello(host=5),
    hello(host="a\nmpidl: all is well"),
    hello(rank="0"),
    hello(process=2**60),
    [hello()],
    b"GET / HTTP/1.1",
    b"\x80\x04\x95\x00",
    b"\xff\xfe",
    b"[" * 4000,
    b"1" * 4090,
    b"{" * 100_000,
    b"",
]


@pytest.mark.parametrize("message", STRANGE, ids=lambda m: str(m)[:40])
def test_a_stranger_is_not_heard(message: Any, listener: Listener) -> None:
    rank = Rank(listener)
    assert rank.say(message) is None
    assert listener.members == []


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"ended": 1},
        {"ended": True},
        {"ended": "0"},
        {"ended": [0]},
        {"size": -1},
        {"size": 1e3},
        {"ping": "x"},
        {"ping": 1, "steps": None},
        {"nothing": 1},
        b"x" * 5000,
    ],
    ids=str,
)
def test_a_rank_that_speaks_another_language_is_lost(message: Any, listener: Listener) -> None:
    rank = Rank(listener)
    rank.say(hello())
    assert rank.say(message) is None
    (member,) = listener.members
    assert member.closed == "broken" and member.status is None


def test_a_line_that_has_no_end(listener: Listener) -> None:
    rank = Rank(listener)
    rank.link.sendall(b" " * 9000)
    assert rank.answers() is None


def test_strangers_take_no_rank_its_place(listener: Listener) -> None:
    ranks = [Rank(listener) for _ in range(2)]
    assert [rank.say(hello()) for rank in ranks] == [[{"welcome": 1}]] * 2
    strangers = [Rank(listener) for _ in range(9)]
    for _ in range(20):
        listener.look(0.01)
    late = Rank(listener)
    assert late.say(hello()) == [{"welcome": 1}]
    assert [rank.say({"ping": 1, "steps": 0}) for rank in ranks] == [[{"answer": 1}]] * 2
    assert len(listener._connections) <= 6
    assert strangers[0].answers() is None


def test_a_silent_stranger_is_closed() -> None:
    now = 100.0
    listener = Listener(TOKEN, everywhere=False, most=6, clock=lambda: now)
    rank = Rank(listener)
    assert rank.answers() == []
    now += 4
    listener.tick()
    assert rank.answers() == []
    now += 2
    listener.tick()
    assert rank.answers() is None
    listener.close()


def test_ranks_of_an_attempt_that_is_over_end(listener: Listener) -> None:
    rank, late, early = Rank(listener), Rank(listener), Rank(listener)
    rank.say(hello())
    listener.end()
    assert rank.answers() == [{"end": 1}]
    assert rank.say({"ping": 1, "steps": 0}) == []  # no lease any more
    assert late.say(hello(rank=1)) == [{"end": 1}]
    listener.begin(1)
    assert rank.answers() is None
    assert early.say(hello(attempt=0)) == [{"end": 1}] or early.answers() is None
    assert listener.members == []
    new = Rank(listener)
    assert new.say(hello(attempt=1)) == [{"welcome": 1}]


def test_a_host_lives_whose_process_is_busy(listener: Listener) -> None:
    """Nothing reads there: the system's own acknowledgements are the sign of life."""
    rank = Rank(listener)
    rank.say(hello())
    (member,) = listener.members
    for _ in range(4):
        time.sleep(0.4)
        listener.tick()
    assert clock() - member.heard < 0.9
    assert clock() - member.answered > 1.5


def test_silence_is_what_is_not_acknowledged(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(listener)
    rank.say(hello())
    (member,) = listener.members
    monkeypatch.setattr("mpidl.cli.listener._acknowledged", lambda _: False)
    heard = member.heard
    for _ in range(2):
        time.sleep(0.6)
        listener.tick()
    assert member.heard == heard
    rank.say({"ping": 1, "steps": 0})
    assert member.heard > heard + 1


# --- what an attempt comes to


def member(**what: Any) -> Member:
    made = Member(0, "here", 1, "127.0.0.1", answered=0.0, heard=0.0)
    for name, value in what.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ([(2, 0), (2, 0)], 0),
        ([(2, 75), (2, 75)], 75),
        ([(2, 74), (2, 74), (3, None)], 74),  # one died, and the others went on
        ([(2, 0), (2, None)], None),
        ([(2, 0)], None),
        ([(2, 0), (2, 75)], None),
        ([(3, 0), (2, 0), (2, 0)], None),
        ([(None, 0)], None),
        ([], None),
    ],
)
def test_complete_is_what_all_ranks_say(
    told: list[tuple[int | None, int | None]], status: int | None
) -> None:
    assert completed([member(size=size, status=s) for size, s in told]) == status


@pytest.mark.parametrize("elastic", [False, True])
def test_verdicts(elastic: bool) -> None:
    verdict = Verdict(elastic=elastic, ranks=2, silence=6)
    well, other = member(), member(rank=1, host="there")
    assert verdict.reason([], 100.0) == ""
    assert verdict.reason([well, other], 6.0) == ""
    well.heard = 6.0
    assert verdict.reason([well, other], 6.1) == "there has been silent for 6 s"
    other.closed, other.closed_at = "closed", 6.1
    assert verdict.reason([well, other], 6.1 + DEATH_SECONDS) == ""
    told = verdict.reason([well, other], 6.2 + DEATH_SECONDS)
    assert told == ("" if elastic else "rank 1 on there was lost")
    well.closed, well.closed_at = "closed", 6.0
    told = verdict.reason([well, other], 6.2 + DEATH_SECONDS)
    assert told == "rank 0 on here was lost, and 1 more"
    other.closed, other.status = "", 0  # it has ended well, and may take long to go
    assert verdict.reason([other], 1e6).startswith("1 of 2 ranks have not started")


def test_ranks_that_do_not_start() -> None:
    verdict = Verdict(elastic=False, ranks=3, silence=1e9)
    members = [member(), member()]
    assert verdict.reason(members, 50.0) == ""
    assert verdict.reason(members, 50.0 + START_SECONDS) == ""
    assert verdict.reason(members, 51.0 + START_SECONDS) == "1 of 3 ranks have not started"


@pytest.mark.parametrize(
    ("attempts", "told"),
    [
        ([(0, 1), (0, 1)], "2 attempts in a row failed before their first step"),
        ([(0, 200), (0, 200)], "2 attempts in a row failed before their first step"),
        ([(0, 900), (0, 900)], ""),
        ([(7, 1), (7, 1), (7, 1)], "2 attempts in a row failed soon, and not beyond step 7"),
        ([(7, 1), (8, 1), (9, 1), (9, 1)], ""),
        ([(7, 60), (7, 60), (7, 60)], ""),
        ([(7, 60), (7, 1), (8, 60), (7, 1)], ""),
    ],
)
def test_attempts_in_vain(attempts: list[tuple[int, float]], told: str) -> None:
    vain = Vain()
    said = ""
    for steps, seconds in attempts:
        assert not said
        said = vain.add(steps, seconds, hosts_lost=False)
    assert said == told
    lost = Vain()
    assert not any(lost.add(*attempt, hosts_lost=True) for attempt in attempts)


# --- hosts


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SLURM's commands be stand-ins, in a job on n1, n2 and n3."""
    texts = {
        "sinfo": 'printf "n1 alloc\\nn2 down*\\nn3 mix*\\n"',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")


@pytest.mark.usefixtures("slurm")
def test_hosts_that_slurm_knows_to_be_down() -> None:
    assert places.down_in_slurm(["n1", "n2", "n3"]) == {"n2", "n3"}


def test_which_host_it_is() -> None:
    assert places.host_of("b.cluster", "10.0.0.1", ["a", "b"]) == "b"
    assert places.host_of("b", "10.0.0.1", ["a.cluster", "b.cluster"]) == "b.cluster"
    assert places.host_of("x", "127.0.0.1", ["localhost"]) == "localhost"
    assert places.host_of("x", "10.0.0.1", ["localhost"]) is None
    assert places.is_here(socket.gethostname())
    assert not places.is_here("no-such-host")
    assert places.addresses(["localhost"])
    assert places.addresses([]) == ["127.0.0.1"]


def test_snapshots_go_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MEMORY", tmp_path)
    for name in ("mpidl-abc1-1", "mpidl-abc1-2", "mpidl-abc12-1"):
        (tmp_path / name / "step").mkdir(parents=True)
    (tmp_path / "mpidl-abc1-3").symlink_to(tmp_path / "mpidl-abc12-1")
    places.remove_snapshots("abc1")
    assert {path.name for path in tmp_path.iterdir()} == {"mpidl-abc12-1", "mpidl-abc1-3"}
    assert (tmp_path / "mpidl-abc12-1/step").exists()
