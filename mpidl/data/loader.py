"""`Loader`: batches that worker processes prepare while the rank computes.

What it needs is imported when it is first used: few scripts that import mpidl have a loader.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from mpidl.array import to_device
from mpidl.data.batches import batches
from mpidl.errors import InvalidArgument
from mpidl.refuse import told, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from mpidl.array import Array
    from mpidl.data.batches import Batches
    from mpidl.data.dataset import Dataset
    from mpidl.data.workers.parcel import Parcel
    from mpidl.data.workers.process import Worker
    from mpidl.data.workers.worker import Task
    from mpidl.world import World

    Transform = Callable[[Array, Array, np.random.Generator], tuple[Array, Array]]


class Loader:
    """The batches of `data.batches`, taken and transformed by `workers` processes of each rank.

    What it yields is a pure function of (seed, epoch), whatever `workers` and `prefetch`: with 0
    workers the rank does the work itself, in the same way. The arrays are the caller's own.

    Workers are fresh interpreters, started at the first iteration, and they last as long as the
    loader. They touch no MPI, have one thread for linear algebra each, may use the cores that the
    rank may use, and end with the rank, however it ends. They get the data set and the transform
    as these are when the loader is made: arrays once for all workers of the rank, through shared
    memory, and memory-mapped files by their names.

    Args:
        dataset: anything with a length and `take`; picklable, where there are workers.
        batch_size: samples of all ranks together.
        world: the ranks; None for this process alone.
        workers: processes of each rank; 0 for none.
        prefetch: batches that each worker may be ahead. The rank holds the memory of
            `workers * prefetch` of its shards.
        transform: function (x (n, ...), y (n, ...), rng) -> (x, y) of a whole shard, so that NumPy
            may work on all its samples at once; not called for a shard without samples. `rng` is a
            np.random.Generator that depends on seed, epoch, step and the shard's place in the
            global batch.
        seed, shuffle, device, microbatches: as in `data.batches`; a microbatch is a shard.

    Collective, as is `epoch`, but not the iteration. Raises on every rank what `data.batches`
    raises, and InvalidArgument for workers below 0, prefetch below 1, and a data set or transform
    that cannot be sent to workers. An iteration raises what `take` or the transform raises, with
    the worker's traceback as its cause, and WorkerFailed where a worker was killed.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        world: World | None,
        workers: int = 2,
        prefetch: int = 2,
        transform: Transform | None = None,
        seed: int = 0,
        shuffle: bool = True,
        device: str = "cpu",
        microbatches: int | None = None,
    ) -> None:
        self.microbatches = microbatches
        self.dataset, self.batch_size, self.world = dataset, batch_size, world
        self.workers, self.prefetch, self.transform = workers, prefetch, transform
        self.seed, self.shuffle, self.device = seed, shuffle, device
        self.next_epoch = 0  #: that `iter` begins
        self.epoch(0)  # checks what it is given
        self._run = 0
        self._closed = False
        self._running: list[Worker] = []
        with nullcontext() if world is None else world.together():
            self._parcel = self._pack()
            self._end = weakref.finalize(self, _end, self._parcel, self._running, os.getpid())

    def __len__(self) -> int:
        """Return the number of batches of one epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Begin the next epoch, the first being 0. Collective."""
        number, self.next_epoch = self.next_epoch, self.next_epoch + 1
        return iter(self.epoch(number))

    def epoch(self, epoch: int, *, device: str | None = None) -> Batches:
        """Return the batches of one epoch. Collective.

        They may be iterated over again; the loader works on one iteration at a time. `device`
        overrules the loader's.
        """
        made = batches(
            self.dataset,
            self.batch_size,
            world=self.world,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            device=self.device if device is None else device,
            microbatches=self.microbatches,
        )
        return replace(made, load=self._load)

    def close(self) -> None:
        """End the workers and free their memory. Not collective; the loader yields no more."""
        self._closed = True
        self._end()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pack(self) -> Parcel | None:
        whole("Loader: workers", self.workers)
        whole("Loader: prefetch", self.prefetch, 1)
        if not (self.transform is None or callable(self.transform)):
            raise InvalidArgument(f"Loader: transform={told(self.transform)}: expected a function")
        if self.workers == 0:
            return None
        from mpidl.data.workers.parcel import pack

        return pack(dataset=self.dataset, transform=self.transform)

    def _load(self, epoch: Batches) -> Iterator[tuple[Array, Array]]:
        self._run += 1
        run = self._run
        self._check(run)
        tasks = self._tasks(epoch, run)
        for x, y in self._by_workers(tasks) if self.workers else self._alone(tasks):
            yield to_device(x, epoch.device), to_device(y, epoch.device)
            self._check(run)

    def _check(self, run: int) -> None:
        if self._closed:
            raise InvalidArgument("Loader: it is closed; make another one")
        if run != self._run:
            raise InvalidArgument(
                "Loader: another iteration has begun, which ended this one; use one loader for each"
            )

    def _tasks(self, epoch: Batches, run: int) -> Iterator[Task]:
        """Yield the tasks of an epoch. They go to the workers in turn, and in each to its slots."""
        from mpidl.data.workers.worker import Task

        turns = max(1, self.workers)
        for number, shard in enumerate(epoch.shards()):
            turn = number % turns, number // turns % self.prefetch
            yield Task(run, self.seed, epoch.epoch, shard.step, *turn, shard.first, shard.samples)

    def _alone(self, tasks: Iterator[Task]) -> Iterator[tuple[Array, Array]]:
        from mpidl.data.workers.worker import prepare

        for task in tasks:
            yield prepare(self.dataset, self.transform, task)

    def _by_workers(self, tasks: Iterator[Task]) -> Iterator[tuple[Array, Array]]:
        asked: deque[Task] = deque()

        def ask(count: int) -> None:
            for task in islice(tasks, count):
                self._running[task.worker].send(task)
                asked.append(task)

        try:
            self._start()
            ask(self.workers * self.prefetch)
            while asked:
                task = asked.popleft()
                x, y = self._running[task.worker].receive(task)
                x, y = x.copy(), y.copy()
                ask(1)  # its slot is free
                yield x, y
        except KeyboardInterrupt:  # perhaps in the middle of a message: nobody may read the rest
            for worker in self._running:
                worker.process.kill()
            _stop(self._running)
            raise

    def _start(self) -> None:
        """Start the workers, unless they run: none does at first, and one may have been killed."""
        if len(self._running) < self.workers or not all(w.alive() for w in self._running):
            _stop(self._running)
        if self._running:
            return
        from mpidl.data.workers.process import Worker

        assert self._parcel is not None
        for number in range(self.workers):
            self._running.append(Worker(number, self._parcel, self.prefetch))
        for worker in self._running:  # all are starting by now; a large message must be awaited
            worker.send(self._parcel)


def _stop(workers: list[Worker]) -> None:
    from mpidl.data.workers.process import stop

    stop(workers)
    workers.clear()


def _end(parcel: Parcel | None, workers: list[Worker], process: int) -> None:
    """Free everything; but not in a forked copy of the rank, whose workers they are not."""
    if os.getpid() != process:
        return
    if workers:
        _stop(workers)
    if parcel is not None:
        os.close(parcel.file)
