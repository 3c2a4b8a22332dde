"""Faults on purpose: each does what it says, where it says, once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpidl.bucket import Bucket
from mpidl.errors import InvalidArgument
from mpidl.testing import (
    MOMENTS,
    Corrupt,
    Cut,
    Hang,
    Kill,
    Plan,
    Raise,
    Slow,
    Stop,
    faults_from_environment,
    inject,
    parse,
)
from mpidl.testing.__main__ import main

# JAX, which other tests of this process import, warns of any fork: here children end by a signal
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

BLOCKS, STEPS = 5, 8
NULL = object()


class Strategy:
    """Tells `said` what it does."""

    def __init__(self, said: Callable[[str], None]) -> None:
        self.said = said

    def reduce(self, grad: Any, weight: float) -> Iterator[Any]:  # noqa: ARG002
        for block in range(BLOCKS):
            self.said(f"reduce {block}")
            yield block

    def stream(self, grads: Any, weight: float) -> Iterator[Any]:
        raise NotImplementedError

    def share(self, param: Any) -> None:  # noqa: ARG002
        self.said("share")


class Replica:
    """What faults need of a `DataParallel`, without MPI."""

    def __init__(self, said: Callable[[str], None], rank: int = 0, size: int = 1) -> None:
        self.said, self.steps = said, 0
        world = SimpleNamespace(rank=rank, size=size)
        comm = SimpleNamespace(Get_parent=lambda: NULL)
        self.world = SimpleNamespace(
            MPI=SimpleNamespace(COMM_WORLD=world, COMM_NULL=NULL, Comm=comm)
        )
        self.strategy = Strategy(said)
        self.update = SimpleNamespace(strategy=self.strategy)
        arrays = np.zeros(24, np.float32), np.zeros(24, np.float32)
        self.buckets = [Bucket(*arrays, {"a": (0, (5,)), "b": (16, (2, 3))})]

    def step(self) -> None:
        self.said(f"step {self.steps}")
        for _ in self.strategy.reduce(None, 1.0):
            pass
        self.strategy.share(None)
        self.said(f"done {self.steps}")
        self.steps += 1


def steps_of(*faults: Any, rank: int = 0, size: int = 1, **options: Any) -> list[str]:
    """Return what a replica says in STEPS steps."""
    said: list[str] = []
    replica = Replica(said.append, rank, size)
    with inject(replica, *faults, **options):  # type: ignore[arg-type]
        for _ in range(STEPS):
            replica.step()
    return said


def in_child(*faults: Any, pause: float = 0.0, **options: Any) -> tuple[int, list[str]]:
    """Let a child process make the steps. Returns its status, and what its replica said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            replica = Replica(lambda text: os.write(writing, f"{text}\n".encode()) and None)
            with inject(replica, *faults, **options):  # type: ignore[arg-type]
                for _ in range(STEPS):
                    replica.step()
                    time.sleep(pause)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        said = lines.read().splitlines()
    return os.waitpid(child, 0)[1], said


def place(said: list[str]) -> tuple[str, int]:
    """Return the last thing said, and the step it belongs to."""
    return said[-1], int([line for line in said if line.startswith("step")][-1].split()[1])


def test_kill_at_each_moment(rng: np.random.Generator, tmp_path: Path) -> None:
    step, seed = int(rng.integers(1, STEPS)), int(rng.integers(1000))
    ends = {
        "before": f"done {step - 1}",
        "reduce": "reduce",
        "update": f"reduce {BLOCKS - 1}",
        "share": "share",
    }
    for moment, last in ends.items():
        record = tmp_path / moment
        status, said = in_child(Kill(0, step, moment), seed=seed, record=record)
        assert os.WTERMSIG(status) == signal.SIGKILL, moment
        found, at = place(said)
        assert found.startswith(last), (moment, said)
        assert at == step - (moment == "before"), (moment, said)
        told = json.loads((record / "0.json").read_text())
        assert (told["rank"], told["step"]) == (0, step)
        assert time.monotonic() - 10 < told["time"] < time.monotonic()
        assert os.WIFEXITED(in_child(Kill(0, step, moment), record=record)[0])  # not again


def test_the_block_is_a_random_one() -> None:
    places = {place(in_child(Kill(0, 3, "reduce"), seed=seed)[1])[0] for seed in range(12)}
    assert 2 <= len(places) <= BLOCKS, places


@pytest.mark.parametrize("moment", ["any", 0.005])
def test_kill_at_a_time(moment: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    step = int(rng.integers(1, 4))
    status, said = in_child(Kill(0, step, moment), pause=0.01, record=tmp_path)
    assert os.WTERMSIG(status) == signal.SIGALRM
    assert place(said)[1] <= step + 1 < STEPS
    assert f"done {step - 1}" in said
    assert json.loads((tmp_path / "0.json").read_text())["step"] == step


@pytest.mark.parametrize("kind", [Kill, Stop])
def test_what_did_not_happen_is_prevented(kind: Any, tmp_path: Path) -> None:
    steps_of(kind(0, STEPS - 1, moment=0.05), record=tmp_path)
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["before", "reduce", 0.0])
def test_stop_ends(moment: Any) -> None:
    begin = time.monotonic()
    status, said = in_child(Stop(0, 2, 0.15, moment), pause=0.01)
    assert os.WIFEXITED(status)
    assert len(said) == len(steps_of())
    assert time.monotonic() - begin > 0.15


def test_stop_for_ever() -> None:
    child = os.fork()
    if child == 0:
        try:
            steps_of(Stop(0, 0, None))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_hang_and_slow_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    assert steps_of(Hang(0, 1, 0.03)) == steps_of()
    assert time.monotonic() - begin >= 0.03
    slept: list[float] = []
    monkeypatch.setattr("mpidl.testing.faults.time", SimpleNamespace(sleep=slept.append))
    steps_of(Slow(0, 3, seconds=0.5))
    assert slept == [0.5] * (STEPS - 3)
    slept.clear()
    steps_of(Slow(0, 2, seconds=0.5, steps=2))
    assert slept == [0.5] * 2
    slept.clear()
    steps_of(Slow(0, 1, factor=3.0))
    assert len(slept) == STEPS - 1
    assert 0 < min(slept) <= max(slept) < 1


def test_raise(rng: np.random.Generator) -> None:
    with pytest.raises(RuntimeError, match="a leaf"):
        steps_of(Raise(0, 3, "a leaf", "reduce"))
    error = KeyError("a leaf")
    with pytest.raises(KeyError) as caught:
        steps_of(Raise(0, 3, error))
    assert caught.value is error


@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_corrupt_flips_bits_of_arrays(what: str, rng: np.random.Generator) -> None:
    replica, bits = Replica(lambda _: None), int(rng.integers(1, 4))
    flat = replica.buckets[0]
    fault = Corrupt(0, 0, bits, what)
    with inject(replica, fault, seed=int(rng.integers(1000))):  # type: ignore[arg-type]
        replica.step()
        replica.step()
    changed, other = (flat.grad, flat.param)[:: 1 if what == "gradient" else -1]
    found = int(np.unpackbits(changed.view(np.uint8)).sum())
    assert found in range(bits, 0, -2)  # the same bit may flip twice
    assert not other.any()
    assert not changed[5:16].any()  # between the arrays
    assert not changed[22:].any()


def test_ranks_and_steps_are_drawn_alike_on_all_ranks(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    first, seen = int(rng.integers(1000)), []
    for seed in range(first, first + 40):
        record = tmp_path / str(seed)
        for rank in range(3):
            fault = Corrupt(step=(2, 4))
            steps_of(fault, rank=rank, size=3, seed=seed, record=record / str(rank))
        (told,) = (json.loads(path.read_text()) for path in record.glob("*/0.json"))
        seen.append((told["rank"], told["step"]))
    ranks, steps = map(set, zip(*seen, strict=True))
    assert ranks == {0, 1, 2}
    assert steps == {2, 3, 4}


def test_nothing_is_changed_where_nothing_happens() -> None:
    plain, replica = Replica.step, Replica(lambda _: None)
    with inject(replica, Raise(1, 0)):  # type: ignore[arg-type]
        assert Replica.step is plain
    with inject(replica, Raise(0, 100, moment="share")):  # type: ignore[arg-type]
        assert Replica.step is not plain
        replica.step()
        assert "share" in vars(replica.strategy)
    assert Replica.step is plain
    assert set(vars(replica.strategy)) == {"said"}


def test_a_new_replica_of_a_trainer() -> None:
    """As after the death of a rank: steps are made again, what has happened is not."""
    first, second = Replica(lambda _: None), Replica(lambda _: None)
    trainer = SimpleNamespace(replica=first, world=first.world)
    faults = Raise(0, 1, "one"), Raise(0, 2, "two", "share")
    with inject(trainer, *faults):  # type: ignore[arg-type]
        first.step()
        with pytest.raises(RuntimeError, match="one"):
            first.step()
        trainer.replica = second
        second.step()
        second.step()
        with pytest.raises(RuntimeError, match="two"):
            second.step()


def test_faults_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIDL_FAULTS", raising=False)
    assert faults_from_environment() == Plan()
    asked = [
        {"fault": "Kill", "rank": 2, "step": [1, 7], "moment": "any"},
        {"fault": "Slow", "seconds": 0.1},
        {"fault": "Corrupt", "step": 3, "bits": 2},
        {"fault": "Cut", "seconds": None, "interface": "eth1"},
    ]
    monkeypatch.setenv("MPIDL_FAULTS", json.dumps({"faults": asked, "seed": 4, "record": "x"}))
    plan = faults_from_environment()
    faults = Kill(2, (1, 7), "any"), Slow(seconds=0.1), Corrupt(step=3, bits=2)
    assert plan == Plan((*faults, Cut(seconds=None, interface="eth1")), 4, "x")


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"faults": [{"fault": "Kil"}]}',
        '{"faults": [{"fault": ["Kill"]}]}',
        '{"faults": ["Kill"]}',
        '{"faults": [{"fault": "Kill", "ranks": 1}]}',
        '{"faults": [{"fault": "Kill", "rank": "1"}]}',
        '{"faults": [{"fault": "Kill", "rank": -1}]}',
        '{"faults": [{"fault": "Kill", "step": [3, 2]}]}',
        '{"faults": [{"fault": "Kill", "step": [3]}]}',
        '{"faults": [{"fault": "Kill", "moment": "now"}]}',
        '{"faults": [{"fault": "Kill", "moment": -1}]}',
        '{"faults": [{"fault": "Kill", "moment": [1]}]}',
        '{"faults": [{"fault": "Raise", "moment": "any"}]}',
        '{"faults": [{"fault": "Raise", "error": 5}]}',
        '{"faults": [{"fault": "Cut", "interface": ""}]}',
        '{"faults": [{"fault": "Cut", "seconds": -1}]}',
        '{"faults": [{"fault": "Stop", "seconds": "1"}]}',
        '{"faults": [{"fault": "Slow", "factor": 0.5}]}',
        '{"faults": [{"fault": "Slow", "factor": null}]}',
        '{"faults": [{"fault": "Corrupt", "what": "all"}]}',
        '{"faults": [{"fault": "Corrupt", "bits": 0}]}',
        '{"faults": [], "seed": "1"}',
        '{"faults": [], "record": 1}',
        '{"faults": [], "when": 1}',
    ],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text)


def test_moments_are_as_documented() -> None:
    for moment in MOMENTS:
        assert Kill(moment=moment).moment == moment


@pytest.mark.parametrize(
    ("faults", "script", "told"),
    [
        ("[1]", __file__, "MPIDL_FAULTS: expected {"),
        (
            '{"faults": [{"fault": "Kill", "stp": 1}]}',
            __file__,
            "unexpected keyword argument 'stp'",
        ),
        ('{"faults": []}', "nowhere.py", "no such script: nowhere.py"),
    ],
)
def test_a_wrong_plan_is_told_in_one_line(
    faults: str,
    script: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MPIDL_FAULTS", faults)
    monkeypatch.setattr("sys.argv", ["mpidl.testing", script])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("mpidl.testing: ")
    assert told in said
    assert said.count("\n") == 1


def test_a_rank_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps_of(Raise(3, 0), size=3) == steps_of()
    assert "no rank 3 among 3: no Raise(rank=3" in capsys.readouterr().err
    steps_of(Raise(3, 0), rank=1, size=3)
    assert not capsys.readouterr().err


def test_a_host_that_cannot_be_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ranks hear of it before the first step, and no step is made."""
    monkeypatch.setattr("mpidl.testing.cut.PATHS", str(tmp_path))  # no tc
    monkeypatch.setattr("mpidl.testing.cut.links", lambda _: ["eth0"])
    heard: list[int] = []

    @contextmanager
    def together() -> Iterator[None]:
        heard.append(1)
        yield

    for rank in range(2):
        replica = Replica(lambda _: None, rank, 2)
        replica.world.together = together
        expected = (
            pytest.raises(InvalidArgument, match="tc comes with iproute2")
            if rank == 1
            else nullcontext()
        )
        with expected, inject(replica, Cut(1, 2)):  # type: ignore[arg-type]
            pass
    assert heard == [1, 1]
