"""Whether, when and in what groups gradients are averaged while backward goes on."""

from __future__ import annotations

import time
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpidl import clock
from mpidl.errors import InvalidArgument
from mpidl.publisher import Publisher
from mpidl.reducer import Reducer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpidl.bucket import Bucket
    from mpidl.noise import NoiseScale
    from mpidl.strategies import Strategy
    from mpidl.world import World

FIRST_BYTES = 1 << 20  # of the first group: communication begins early
# Of the others, in each step that is measured: of sizes much alike one cannot tell what a group
# costs from what its bytes cost.
GROUP_BYTES = (4 << 20, 1 << 20, 16 << 20)
WATCHED, MEASURED, TRIED = 3, len(GROUP_BYTES), 4  # steps
ADVICE = "pass overlap=False"


class Announces(Protocol):
    """A parameter, as far as an `Overlap` needs to know it."""

    def on_gradient(self, hook: Callable[[Any], None]) -> Callable[[], None]:
        """Call `hook` with this whenever its gradient is complete; return what ends that."""


class Overlap:
    """Starts a `Reducer` in each step, and tells it what is ready.

    The first steps are watched only: where gradients come in one backward, for the samples that
    were counted, on all ranks, the following ones overlap. Then the time of each bucket and that of
    its messages are known, and the buckets are grouped so that the last is averaged the soonest;
    `groups` stay as they are from there on, and are the same on all ranks. Unless it was asked for,
    a few steps more are tried, and if they take longer than those that were only watched, it ends:
    where cores are short, sending while computing may cost more than it saves.

    Args:
        world: for the calling thread; `strategy` must be made for another, or be alone in using it.
        parameters: by name, as in the buckets; those that tell of their gradients.
        samples: returns how many this rank's model was called with in this step.
        group_bytes: about how many bytes to average at a time; None to find out.
        asked: whether to warn where it cannot be.
        keeps, noise: see `Reducer`.
    """

    def __init__(
        self,
        world: World,
        beside: World,
        strategy: Strategy,
        buckets: Sequence[Bucket],
        parameters: Mapping[str, Announces],
        samples: Callable[[], float | None],
        *,
        group_bytes: int | None = None,
        asked: bool = False,
        keeps: bool = False,
        noise: NoiseScale | None = None,
    ) -> None:
        self.world, self.strategy, self.buckets = world, strategy, buckets
        self.active = False
        self._beside, self._samples, self._asked, self._keeps = beside, samples, asked, keeps
        self._nbytes = [flat.grad.nbytes for flat in buckets]
        self._tunes, self._noise = group_bytes is None, noise
        self.groups = grouped(self._nbytes, group_bytes or GROUP_BYTES[0])
        self._steps = 0
        self._irregular: str | None = None
        self._reducer: Reducer | None = None
        self._publisher: Publisher | None = None  # of the step before
        self._start: float | None = None  # of this step's first gradient
        self._finished: float | None = None  # when, the step before
        self._seconds: list[float] = []  # of whole steps, of which the first are timed
        self._first_samples: float | None = None  # that were counted by then
        self._ready_at: list[np.ndarray[Any, Any]] = []  # of each bucket, in each step; seconds
        self._spent: list[tuple[list[int], list[float]]] = []  # bytes and seconds of each group
        self._bucket_of: dict[int, int] = {}
        complete = weakref.WeakMethod(self._complete)

        def on_gradient(parameter: Announces) -> None:
            hook = complete()
            if hook is not None:
                hook(parameter)

        self._removals = []
        for i, flat in enumerate(buckets):
            for name in flat.places:
                self._bucket_of[id(parameters[name])] = i
                self._removals.append(parameters[name].on_gradient(on_gradient))
        self._seen: set[int] = set()
        self._reset()

    @property
    def begun(self) -> bool:
        """Whether this step's gradients are being averaged."""
        return self._reducer is not None

    @clock.counted(clock.REDUCE)
    def finish(self, weight: float) -> tuple[bool, InvalidArgument | None]:
        """End the step, for `weight` samples. Collective.

        Returns whether the buckets hold means already, the same on all ranks; and what was wrong.
        """
        for counted in (self._first_samples, self._samples()):
            if self._irregular is None and self._start is not None and counted != weight:
                self._irregular = f"step(weight={weight:g}), but {counted} samples were counted"
        averaged, problem = False, None
        if self.active:
            if self._reducer is None:
                self._begin(weight)
            assert self._reducer is not None
            self._reducer.finish()
            averaged = self._reducer.total > 0
            if averaged and self._irregular is not None:
                problem = InvalidArgument(
                    f"{self._irregular}, in a step whose gradients were averaged while backward "
                    f"went on: {ADVICE}"
                )
            if averaged and self._tunes:
                self._note(self._reducer.seconds)
        if self._tunes:
            self._ready_at.append(self._times)
        self._reset()
        self._steps += 1
        self._time_step()
        if self._steps == WATCHED:
            self._decide()
        elif self._steps == WATCHED + MEASURED and self.active and self._tunes:
            self._tune()
        self._tunes &= self.active or self._steps < WATCHED
        self._tunes &= self._steps < WATCHED + MEASURED
        return averaged, problem

    def publish(self) -> list[Callable[[], None]]:
        """Begin to publish the parameters, as updated after `finish`; in a thread. Collective.

        Returns a function for each bucket that waits until its parameters have come, and raises
        what went wrong. The last bucket, of the first layers, comes first: forward needs it first.
        """
        publisher = Publisher(self.strategy, [flat.param for flat in reversed(self.buckets)])
        publisher.start()
        self._publisher = publisher
        return [partial(publisher.wait, i) for i in reversed(range(len(self.buckets)))]

    def synchronize(self) -> None:
        """Wait until parameters are published, and raise what went wrong. Not collective."""
        if self._publisher is not None:
            self._publisher.end()

    def forget(self) -> None:
        """Note that the gradients so far are not for a step. Raises where some are averaged."""
        if self._start is None:
            return
        if self._reducer is not None:
            raise InvalidArgument(
                "zero_grad() after a backward whose gradients are being averaged already, unlike "
                f"in the first steps: {ADVICE}"
            )
        self._irregular = "gradients were forgotten after backward"
        self._reset()

    def close(self) -> None:
        """End this. Not collective."""
        self.active = False
        if self._reducer is not None:
            self._reducer.abandon()
        if self._publisher is not None:
            self._publisher.join()
        for remove in self._removals:
            remove()

    def _reset(self) -> None:
        self._reducer, self._start = None, None
        self._left = [len(flat.places) for flat in self.buckets]
        self._times = np.zeros(len(self.buckets))
        self._seen.clear()
        if self.active:
            self._irregular = None

    def _complete(self, parameter: Announces) -> None:
        """Count a gradient that is complete."""
        now = time.perf_counter()
        if self._start is None:
            self._start, self._first_samples = now, self._samples()
        if id(parameter) in self._seen:
            self._irregular = "several backward passes in a step"
            return
        self._seen.add(id(parameter))
        if self.active and self._reducer is None:
            self._begin(self._first_samples)
        i = self._bucket_of[id(parameter)]
        self._left[i] -= 1
        if not self._left[i]:
            self._times[i] = now - self._start
            if self._reducer is not None:
                self._reducer.ready(i)

    def _begin(self, samples: float | None) -> None:
        self._reducer = Reducer(
            self._beside,
            self.strategy,
            self.buckets,
            self.groups,
            samples,
            keeps=self._keeps,
            after=self._publisher,
            noise=self._noise,
        )
        self._reducer.start()

    def _decide(self) -> None:
        """Overlap from now on, if all ranks can. Collective."""
        reasons = [reason for reason in self.world.gather(self._irregular) if reason]
        self.active = not reasons
        if reasons:
            self.close()
            if self._asked and self.world.rank == 0:
                warnings.warn(f"overlap=True, but not here: {reasons[0]}", stacklevel=5)

    def _time_step(self) -> None:
        """Time from step to step, and end what does not pay. Collective at the last of them."""
        if self._asked or self._steps > WATCHED + MEASURED + TRIED:
            return
        now = time.perf_counter()
        if self._finished is not None:
            self._seconds.append(now - self._finished)  # [i]: from the end of step i to step i + 1
        self._finished = now
        if self._steps < WATCHED + MEASURED + TRIED or not self.active:
            return
        watched, tried = self._seconds[: WATCHED - 1], self._seconds[WATCHED + MEASURED :]
        plain, overlapped = self.world.broadcast((min(watched), min(tried)))
        if overlapped > plain:
            self.close()

    def _note(self, seconds: list[float]) -> None:
        """Keep what each group took, and try others in the next step."""
        self._spent.append((self._sizes(), seconds))
        self.groups = grouped(self._nbytes, GROUP_BYTES[len(self._spent) % len(GROUP_BYTES)])

    def _sizes(self) -> list[int]:
        """Return the bytes of each group."""
        return [sum(self._nbytes[i] for i in group) for group in self.groups]

    def _tune(self) -> None:
        """Choose the groups for which the last bucket is averaged the soonest. Collective."""
        times = self.world.gather((np.mean(self._ready_at, axis=0), self._spent))
        ready = np.max([ready for ready, _ in times], axis=0)
        if not self._spent:  # on no rank
            return
        in_order = np.maximum.accumulate(ready).tolist()  # a bucket waits for those before it
        sizes = np.concatenate([sizes for sizes, _ in self._spent])
        spent = [np.concatenate([seconds for _, seconds in found]) for _, found in times]
        latency, per_byte = fit(sizes.tolist(), np.median(spent, axis=0).tolist())
        candidates = [grouped(self._nbytes, 1 << power) for power in range(16, 33)]
        ends = [last_end(g, in_order, self._nbytes, latency, per_byte) for g in candidates]
        # rank 0's numbers count; of equals the largest: fewer messages
        best = min(range(len(ends)), key=lambda i: (round(ends[i], 5), -i))
        self.groups = self.world.broadcast(candidates[best])
        self._ready_at.clear()
        self._spent.clear()


def for_thread(world: World, overlap: bool | str, *obstacles: tuple[str, bool]) -> World | None:
    """Return the world for the thread of an `Overlap`, or None where there is none. Collective.

    `obstacles` are names of what nothing can overlap with, and whether it is there.
    """
    if overlap is False or (overlap == "auto" and world.nodes == 1):
        return None
    reasons = [name for name, there in obstacles if there]
    if not world.threads:
        reasons.append("an MPI without MPI_THREAD_MULTIPLE")
    if not reasons:
        return world.for_thread()
    if overlap is True and world.rank == 0:
        text = f"overlap=True, but not here: not with {' or '.join(reasons)}"
        warnings.warn(text, stacklevel=3)
    return None


def made_for_thread(strategy: object) -> bool:
    """Return whether a strategy, or what is made of this name, is not also for the caller's thread.

    Two threads must not be in collectives of one communicator at once (MPI-4.1, 6.14).
    """
    world = getattr(strategy, "world", None)
    return isinstance(strategy, str) or bool(getattr(world, "beside", False))


def grouped(nbytes: Sequence[int], size: int) -> list[list[int]]:
    """Return the numbers of buckets in groups of about `size` bytes; the first is small."""
    groups: list[list[int]] = [[]]
    held = 0
    for i, n in enumerate(nbytes):
        wanted = min(size, FIRST_BYTES) if len(groups) == 1 else size
        if groups[-1] and held + n > wanted:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += n
    return groups


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return latency and seconds per byte, neither below 0, of the line through these points."""
    if len(set(sizes)) == 1:
        return 0.0, seconds[0] / sizes[0]
    slope, start = np.polyfit(sizes, seconds, 1)
    if slope <= 0:
        return float(np.mean(seconds)), 0.0
    if start < 0:
        return 0.0, float(np.sum(seconds) / np.sum(sizes))
    return float(start), float(slope)


def last_end(
    groups: Sequence[Sequence[int]],
    ready: Sequence[float],
    nbytes: Sequence[int],
    latency: float,
    per_byte: float,
) -> float:
    """Return when the last group is averaged: one after the other, none before it is ready."""
    end = 0.0
    for group in groups:
        end = max(end, ready[group[-1]]) + latency + per_byte * sum(nbytes[i] for i in group)
    return end
