"""The worker process: takes samples, transforms them, and puts them into shared memory."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl import mpi
from mpidl.array import to_numpy
from mpidl.data.workers.slot import Slot
from mpidl.errors import InvalidArgument, MpidlError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import NoReturn

    from mpidl.array import Array
    from mpidl.data.workers.parcel import Parcel
    from mpidl.data.workers.slot import Place

#: Signals that terminals and clusters send to every process of a job. What they mean is for the
#: rank to decide; its workers end when it does.
FOR_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TEXT_LIMIT = 1 << 15  # of a failure: no reply may fill the socket


@dataclass(frozen=True)
class Task:
    """One shard to prepare. The random numbers of its transform depend on nothing else."""

    run: int  #: counts the iterations of a loader: a newer one makes older tasks void
    seed: int
    epoch: int
    step: int
    worker: int
    slot: int  #: of the worker's, where the shard goes
    start: int  #: of the shard, in the global batch
    indices: Array  #: (n,) of the samples


@dataclass(frozen=True)
class Ready:
    """The answer to a task: where in its slot the two arrays lie."""

    run: int
    places: list[Place]


@dataclass(frozen=True)
class Failed:
    """The answer to a task that raised an error; to all tasks (None) if setting up did."""

    run: int | None
    error: bytes | None  #: pickled, where that is possible
    text: str  #: with the traceback


def prepare(dataset: Any, transform: Any, task: Task) -> tuple[Array, Array]:
    """Return the arrays (n, ...) of `task`, contiguous in memory, whoever prepares them.

    Raises InvalidArgument for anything but two arrays of n samples.
    """
    x, y = dataset.take(task.indices)
    if transform is None or len(task.indices) == 0:
        return _plain("data set", x, y, task)
    # A spawn_key, since plain zeros at the end would not change the seed of the epoch's shuffle.
    seeds = np.random.SeedSequence([task.seed, task.epoch], spawn_key=(task.step, task.start))
    made = transform(x, y, np.random.default_rng(seeds))
    if not isinstance(made, tuple) or len(made) != 2:
        raise InvalidArgument(f"Loader: the transform returned {type(made).__name__}, not (x, y)")
    return _plain("transform", *made, task)


def _plain(source: str, x: Any, y: Any, task: Task) -> tuple[Array, Array]:
    x, y = np.ascontiguousarray(to_numpy(x)), np.ascontiguousarray(to_numpy(y))
    for name, array in (("x", x), ("y", y)):
        if array.dtype.hasobject or len(array) != len(task.indices):
            raise InvalidArgument(
                f"Loader: the {source} returned {name} {array.shape} of {array.dtype}; expected "
                f"({len(task.indices)}, ...) of numbers, as many samples as were asked for"
            )
    return x, y


def main(socket: int, parcel: int, slots: list[int]) -> None:
    """Serve the rank at the other end of `socket`; all arguments are file descriptors."""
    for number in FOR_THE_RANK:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_RANK)  # blocked until they are ignored
    for file in (socket, parcel, *slots):
        os.set_inheritable(file, False)
    from multiprocessing.connection import Connection

    mpi.load = _refuse_mpi
    Serving(Connection(socket), [Slot(file) for file in slots]).serve(parcel)


def _refuse_mpi() -> NoReturn:
    raise MpidlError(
        "a worker of data.Loader is no rank and starts no MPI: call mpidl.init() in the script, "
        "not in a data set, in a transform or in a module that they are imported from"
    )


class Serving:
    """The worker's loop, and the thread that listens for it."""

    def __init__(self, connection: Connection, slots: list[Slot]) -> None:
        self.connection, self.slots = connection, slots
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.newest: float = -1  #: run that the rank has asked for
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Empty the socket, so that the rank never waits in sending; end when the rank has."""
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            self.newest = message.run if isinstance(message, Task) else self.newest
            if message is None:
                self.newest = float("inf")
            self.inbox.put(message)

    def serve(self, file: int) -> None:
        """Do the tasks, in their order, until there is a None."""
        parcel: Parcel = self.inbox.get()
        missing = parcel.excerpt.missing if parcel.excerpt else {}
        try:
            dataset, transform = parcel.open(file)
        except BaseException as error:
            failed = _failed(None, error, missing)
            for _ in iter(self.inbox.get, None):
                self.answer(failed)
            return
        for task in iter(self.inbox.get, None):
            if task.run < self.newest:
                continue
            answer: Ready | Failed
            try:
                arrays = prepare(dataset, transform, task)
                answer = Ready(task.run, self.slots[task.slot].write(arrays))
            except BaseException as error:  # also SystemExit: a worker that leaves tells nothing
                answer = _failed(task.run, error, missing)
            self.answer(answer)

    def answer(self, answer: Ready | Failed) -> None:
        """Tell the rank. Where it has gone, say nothing: `listen` ends this process."""
        with suppress(OSError):
            self.connection.send(answer)


def _failed(run: int | None, error: BaseException, missing: dict[str, str]) -> Failed:
    text = "".join(traceback.format_exception(error))
    name = getattr(error, "name", None)
    if isinstance(error, NameError) and name in missing:
        text += f"(`{name}` of the script could not be sent to the workers: {missing[name]})\n"
    pickled = None
    if isinstance(error, Exception):
        with suppress(Exception):  # of a class that cannot be pickled
            pickled = pickle.dumps(error)
    if pickled is not None and len(pickled) > TEXT_LIMIT:
        pickled = None
    return Failed(run, pickled, text[-TEXT_LIMIT:])
