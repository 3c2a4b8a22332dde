"""Lets faults happen, by standing around the steps of a `DataParallel`."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.errors import InvalidArgument
from mpidl.parallel import DataParallel
from mpidl.refuse import refuses, told, whole
from mpidl.weights import path_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mpidl.testing.faults import Fault
    from mpidl.trainer import Trainer

FIRST_SECONDS = 0.01  # what a step is taken to last before one was seen
EVENTS = ("reduce", "update", "share")  # moments that come several times in a step


@contextmanager
def inject(
    target: Trainer | DataParallel | None,
    *faults: Fault,
    seed: int = 0,
    record: str | Path | None = None,
) -> Iterator[None]:
    """Let `faults` happen to `target` in this context. Not collective: every rank passes the same.

    `target` is a `Trainer`, also when it replaces its replica after a rank was lost, or a
    `DataParallel`; None for every `DataParallel` of this process. What is random depends on `seed`
    alone, but for the times of "any".

    A fault happens once in a job, also where steps are made again. In `record`, a folder, it
    leaves a file, FAULT.json, with "fault", "rank", "step", and "time" (of `time.monotonic`): what
    is there does not happen again in a job that is started anew. `FAULT` is its number in `faults`.

    Raises whatever a `Raise` asks for, from `DataParallel.step`.
    """
    whole("inject: seed", seed)
    for fault in faults:
        if not hasattr(fault, "act"):
            raise InvalidArgument(
                f"inject: expected faults, such as Kill(step=3), found {told(fault)}"
            )
    injector = _Injector(faults, seed, _folder(record))
    if target is not None and not injector.mine(target):
        yield
        return
    kind: Any = DataParallel if target is None else type(getattr(target, "replica", target))
    plain = kind.step

    def step(replica: Any, *args: Any, **kwargs: Any) -> None:
        if target is not None and replica is not getattr(target, "replica", target):
            plain(replica, *args, **kwargs)
        elif injector.mine(replica):
            injector.before(replica)
            plain(replica, *args, **kwargs)
            injector.after(replica)
        else:
            plain(replica, *args, **kwargs)

    with ExitStack() as undo:
        undo.callback(injector.close)
        _replace(undo, kind, "step", step)
        yield


@refuses
def _folder(record: str | Path | None) -> Path | None:
    return None if record is None else path_of(record)


@dataclass
class _Waiting:
    """A fault of this rank that has not happened."""

    number: int
    fault: Fault
    step: int
    rng: np.random.Generator
    event: int = 0  #: which of the step's events it waits for
    prevent: Callable[[], None] | None = None  #: its timer, once it runs


class _Injector:
    def __init__(self, faults: tuple[Fault, ...], seed: int, record: Path | None) -> None:
        self.faults, self.seed, self.record = faults, seed, record
        self.waiting: list[_Waiting] | None = None
        self.counts = dict.fromkeys(EVENTS, 0)
        self.seconds = deque([FIRST_SECONDS], maxlen=9)  #: of steps
        self._replica: Any = None
        self._step, self._begun, self._returned = -1, 0.0, 0.0
        self._hooks = ExitStack()

    def mine(self, target: Any) -> list[_Waiting]:
        """Return the faults of this rank that are still to happen."""
        if self.waiting is None:
            MPI = target.world.MPI
            rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
            self.waiting = []
            for number, fault in enumerate(self.faults):
                rng = np.random.default_rng([self.seed, number])
                whose, step = int(rng.integers(size)), fault.step  # the same draws on all ranks
                first, last = step if isinstance(step, tuple) else (step, step)
                step = int(rng.integers(first, last, endpoint=True))
                if fault.rank is not None:
                    whose = fault.rank
                known = self.record is not None and self._file(number).exists()
                if whose == rank and not known and MPI.Comm.Get_parent() == MPI.COMM_NULL:
                    self.waiting.append(_Waiting(number, fault, step, rng))
        return self.waiting

    def before(self, replica: Any) -> None:
        """`replica.step` is called."""
        now = time.monotonic()
        if replica is not self._replica:
            self._replica = replica
            self._stand_around(replica)
            self._begin(replica.steps)
        elif replica.steps != self._step:  # one ended by `flush`
            self._begin(replica.steps)
        computed = now - self._returned if self._returned else 0.0
        for waiting in list(self.mine(replica)):
            if waiting.fault.moment == "before" and self._step >= waiting.step:
                self._happen(waiting, computed)

    def after(self, replica: Any) -> None:
        """`replica.step` returned."""
        self._returned = time.monotonic()
        if replica.steps == self._step:  # it is one of several calls for an update
            return
        for waiting in list(self.mine(replica)):  # events that did not come
            if waiting.fault.moment in EVENTS and self._step >= waiting.step:
                self._happen(waiting)
        self.seconds.append(self._returned - self._begun)
        self._begin(replica.steps)

    def close(self) -> None:
        """Prevent what has not happened yet."""
        for waiting in self.waiting or []:
            if waiting.prevent is not None:
                waiting.prevent()
                if self.record is not None:
                    self._file(waiting.number).unlink(missing_ok=True)
        self._hooks.close()

    def _begin(self, step: int) -> None:
        counts, self.counts = self.counts, dict.fromkeys(EVENTS, 0)
        self._step, self._begun = step, time.monotonic()
        for waiting in self.waiting or []:
            fault, moment = waiting.fault, waiting.fault.moment
            if step < waiting.step or waiting.prevent is not None:
                continue
            if isinstance(moment, str) and moment in EVENTS:
                waiting.event = int(waiting.rng.integers(max(1, counts[moment])))
            elif moment != "before":
                usual = statistics.median(self.seconds)
                delay = waiting.rng.uniform(0, usual) if moment == "any" else float(moment)
                self._write(waiting, delay)
                waiting.prevent = fault.after(delay)  # type: ignore[attr-defined]

    def _event(self, kind: str) -> None:
        """One of EVENTS has come."""
        for waiting in list(self.waiting or []):
            due = self._step >= waiting.step and self.counts[kind] >= waiting.event
            if waiting.fault.moment == kind and due:
                self._happen(waiting)
        self.counts[kind] += 1

    def _happen(self, waiting: _Waiting, computed: float = 0.0) -> None:
        assert self.waiting is not None
        fault = waiting.fault
        steps = getattr(fault, "steps", None)
        if fault.once or (steps is not None and self._step >= waiting.step + steps):
            self.waiting.remove(waiting)
            if not fault.once:
                return
            self._write(waiting, 0.0)
        fault.act(self._replica, waiting.rng, computed)

    def _write(self, waiting: _Waiting, delay: float) -> None:
        """Remember that it happens, in `delay` seconds."""
        if self.record is None:
            return
        told = {
            "fault": repr(waiting.fault),
            "rank": self._replica.world.MPI.COMM_WORLD.rank,
            "step": self._step,
            "time": time.monotonic() + delay,
        }
        self.record.mkdir(parents=True, exist_ok=True)
        part = self.record / f".{waiting.number}.json"
        part.write_text(json.dumps(told))
        part.rename(self._file(waiting.number))

    def _file(self, number: int) -> Path:
        assert self.record is not None
        return self.record / f"{number}.json"

    def _stand_around(self, replica: Any) -> None:
        """Have `_event` called by the strategy of `replica`."""
        self._hooks.close()
        strategies = {id(s): s for s in (replica.strategy, replica.update.strategy)}
        for strategy in strategies.values():
            for name in ("reduce", "stream"):
                blocks = getattr(strategy, name)
                _replace(self._hooks, strategy, name, self._counted(blocks))
            _replace(self._hooks, strategy, "share", self._shared(strategy.share))

    def _counted(self, blocks: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for block in blocks(*args, **kwargs):
                self._event("reduce")
                yield block

        return wrapped

    def _shared(self, share: Callable[[Any], None]) -> Callable[[Any], None]:
        def wrapped(param: Any) -> None:
            self._event("update")
            share(param)
            self._event("share")

        return wrapped


def _replace(undo: ExitStack, place: Any, name: str, value: Any) -> None:
    """Set an attribute, until `undo` is closed."""
    own = vars(place).get(name)
    setattr(place, name, value)
    undo.callback(delattr if own is None else setattr, place, name, *([] if own is None else [own]))
