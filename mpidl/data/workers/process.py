"""The rank's end of a worker: starts the process, sends it tasks, takes its batches, ends it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpidl.data.workers.slot import Slot, memory_file
from mpidl.data.workers.worker import FOR_THE_RANK, Failed
from mpidl.errors import WorkerFailed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

    from mpidl.array import Array
    from mpidl.data.workers.parcel import Parcel
    from mpidl.data.workers.worker import Task

LOOK_SECONDS = 1.0  # a dead worker's socket stays open while a child of its own has it
STOP_SECONDS = 1.0  # for all workers together to end by themselves
#: Variables by which launchers tell a rank that it is one.
OF_RANKS = (
    *("OMPI_COMM_", "OMPI_UNIVERSE_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "HYDRA_", "PALS_"),
    *("ALPS_APP_", "FLUX_JOB_SIZE", "FLUX_TASK_", "JSM_", "MV2_COMM_"),
    *("SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_PMI"),
)
SETTINGS = {
    "OMP_NUM_THREADS": "1",  # there are as many workers as the user wants to be busy
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPI4PY_RC_INITIALIZE": "0",  # modules of the data set may import mpi4py.MPI
}


class Worker:
    """Worker `number` of this rank, and the slots that its batches come in.

    Starts a fresh interpreter by vfork and exec: a copy of a process in which MPI runs is broken.
    """

    def __init__(self, number: int, parcel: Parcel, slots: int) -> None:
        from multiprocessing.connection import Connection

        self.number = number
        ours, theirs = socket.socketpair()
        with theirs:
            files = [memory_file("mpidl-slot") for _ in range(slots)]
            arguments = (theirs.fileno(), parcel.file, files)
            code = (
                f"import sys; sys.path[:] = {[p for p in sys.path if isinstance(p, str)]}; "
                f"from mpidl.data.workers.worker import main; main(*{arguments})"
            )
            kept = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)  # exec keeps the mask
            try:
                self.process = subprocess.Popen(
                    [sys.executable, *_flags(), "-c", code],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                    pass_fds=(theirs.fileno(), parcel.file, *files),
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        self.slots = [Slot(file) for file in files]
        self.connection = Connection(ours.detach())

    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self.process.poll() is None

    def send(self, message: Parcel | Task | None) -> None:
        """Send the parcel, first; then tasks; then None. That a worker is gone `receive` tells."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self, task: Task) -> list[Array]:
        """Return views of the two arrays of `task`, the oldest that was sent and not received.

        They are valid until the slot gets another task. Raises what the transform or the data set
        raised, and WorkerFailed where the process has ended.
        """
        where = f"epoch {task.epoch}, batch {task.step}"
        while True:
            while not self.connection.poll(LOOK_SECONDS):
                if not self.alive() and not self.connection.poll(0):
                    self._raise_end(where)
            try:
                answer = self.connection.recv()
            except (EOFError, OSError):
                self._raise_end(where)
            if isinstance(answer, Failed) and answer.run in (None, task.run):
                self._raise(answer, where)
            if answer.run == task.run:  # others are left of an iteration that was given up
                return self.slots[task.slot].read(answer.places)

    def _raise(self, failed: Failed, where: str) -> NoReturn:
        where = "while it was set up" if failed.run is None else f"in {where}"
        story = WorkerFailed(f"worker {self.number} of the loader failed {where}:\n\n{failed.text}")
        error = None
        if failed.error is not None:
            with suppress(Exception):  # a class the rank does not know, or of other arguments
                error = pickle.loads(failed.error)
        if error is None:
            raise story
        raise error from story

    def _raise_end(self, where: str) -> NoReturn:
        try:
            status = self.process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            how = "closed its socket"
        else:
            how = f"ended with exit status {status}"
            if status < 0:
                how = f"was ended by signal {-status} ({signal.Signals(-status).name})"
            if status == -signal.SIGKILL:
                how += "; the system does so where memory is short: fewer workers, a smaller "
                how += "prefetch or a smaller batch need less"
        raise WorkerFailed(
            f"worker {self.number} of the loader (process {self.process.pid}), asked for {where}, "
            f"{how}"
        )


def stop(workers: Iterable[Worker]) -> None:
    """End `workers`, soon if they are idle, by force after `STOP_SECONDS`; free their slots."""
    workers = list(workers)
    for worker in workers:
        worker.send(None)
    end = time.monotonic() + STOP_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.connection.close()
        for slot in worker.slots:
            slot.close()


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OF_RANKS)}
    return {**kept, **SETTINGS}


def _flags() -> list[Any]:
    optimize = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    return [*optimize, *(f"-W{option}" for option in sys.warnoptions)]
