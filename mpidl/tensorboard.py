"""`Trainer(tensorboard=True)`: TensorBoard's events, beside the files of the run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.optim.base import rate
from mpidl.refuse import told
from mpidl.tensorboard_graph import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpidl.array import Array
    from mpidl.optim.groups import Groups
    from mpidl.trainer import Trainer

    Record = Mapping[str, Any]

FOLDER = "tensorboard"
MISSING = "Trainer(tensorboard=True) needs tensorboardX: pip install 'mpidl[report]'"
FLUSH_SECONDS = 5  # until events are on disk
QUEUE = (
    1000  # events: where the thread that writes them has died, an epoch's find room all the same
)
SAMPLES = 100_000  # elements at most of one histogram, spread evenly: 10 ms each

_files = count()  # two of one second would have one name


class TensorBoard:
    """Writes OUT/tensorboard on rank 0, from what RunFolder.write gets; elsewhere it is silent.

    `add_image`, `add_scalar`, `add_text` and all else that begins with "add_" is that of
    tensorboardX's SummaryWriter on rank 0, and does nothing on other ranks, and where
    `tensorboard` is False: scripts need no `if`. Arguments are computed on every rank all the
    same. `writer` is the SummaryWriter itself, or None.

    Scalars, by the update they were made at: loss/epoch, loss/steps (of rank 0's samples),
    test/NAME, samples_per_second/..., learning_rate, phases/NAME (shares of the time, of all
    ranks; phases_of_rank_0/NAME between), noise/scale, memory/peak_bytes (of the rank with the
    most), moved_bytes/epoch (of all ranks). Histograms of at most 100,000 elements: parameters/NAME
    after each epoch, which are those of all ranks; gradients/NAME of the first backward of each
    epoch, which are of rank 0's samples alone, before they are averaged. The graph is that of the
    first loss of rank 0: `Watch`.

    A run that goes on does so in the same folder: what was written of later updates is hidden
    (tensorboardX's `purge_step`). On disk is all after `Trainer.close`, and at the script's end.
    """

    def __init__(self, trainer: Trainer, asked: bool) -> None:
        world = trainer.world
        with world.together():
            if not isinstance(asked, bool):
                raise InvalidArgument(f"tensorboard={told(asked)}: expected True or False")
        self.trainer = trainer
        self.folder: Path | None = None  #: where events go, or None
        self._writer: Any = None
        self._last = 0  # update of which something was written
        self._watch: Watch | None = None
        self._gradients: dict[str, Array] = {}  # parts of them, and since when
        self._since = 0
        self._removers: list[Callable[[], None]] = []
        if world.broadcast(asked):  # rank 0's word counts, as for `out`
            out = world.broadcast(trainer.out)
            with world.together():
                if out is None:
                    raise InvalidArgument("tensorboard=True: expected out, a folder, too")
                if find_spec("tensorboardX") is None:
                    raise MpidlError(MISSING)
                self.folder = Path(out) / FOLDER

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("add_"):
            raise AttributeError(
                f"TensorBoard has no {name}: what SummaryWriter has begins with add_"
            )
        return _nothing if self.writer is None else getattr(self.writer, name)

    @property
    def writer(self) -> Any:
        """The SummaryWriter on rank 0, else None. Raises InvalidArgument if it cannot write."""
        if self.folder is None or self.trainer.world.rank:
            return None
        if self._writer is None:
            self._writer = self._open()
        return self._writer

    def _open(self) -> Any:
        from tensorboardX import SummaryWriter

        assert self.folder is not None
        self._last = self.trainer.replica.steps
        try:
            earlier = any(self.folder.glob("*tfevents*"))
            return SummaryWriter(
                str(self.folder),
                purge_step=self._last + 1 if earlier else None,
                max_queue=QUEUE,
                flush_secs=FLUSH_SECONDS,
                filename_suffix=f".{os.getpid()}.{next(_files)}",
            )
        except OSError as error:
            raise InvalidArgument(f"cannot write {self.folder}: {error}") from error

    def follow(self) -> tuple[Callable[[Record], None], ...]:
        """Begin with a `fit`. Returns what is to get each record of the run. Collective."""
        if self.folder is None:
            return ()
        world, trainer = self.trainer.world, self.trainer
        if self._writer is not None and (world.rank or trainer.replica.steps < self._last):
            self.close()  # rank 0 is another one, or it went back to a snapshot
        with world.together():
            first = self.writer is not None and self._watch is None
        if first:
            self._watch = Watch(trainer, self._draw)
        self._listen()
        return (self.write,)

    def _draw(self, graph: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._writer is not None:
            self._writer.file_writer.add_event(Event(graph_def=graph.SerializeToString()), 0)

    def write(self, record: Record) -> None:
        """Write what one line of metrics.jsonl tells, on rank 0. Not collective.

        Raises MpidlError where tensorboardX could not write what came before: a full disk, say.
        """
        writer, step = self.writer, record.get("step", record.get("steps"))
        if writer is None or step is None:
            return
        worker = getattr(writer.file_writer.event_writer, "_worker", None)
        if worker is not None and not worker.is_alive():
            raise MpidlError(f"{self.folder} can be written no more: see the error above")
        when, is_epoch = record.get("time"), record.get("kind", "epoch") == "epoch"
        for tag, value in (*scalars(record), *rates(self.trainer.optimizer, step)):
            writer.add_scalar(tag, value, step, walltime=when)
        if is_epoch:
            for name, parameter in self.trainer.model.named_parameters().items():
                self._histogram(f"parameters/{name}", _some(parameter.data), step)
            for name, values in self._gradients.items():
                self._histogram(f"gradients/{name}", values, self._since)
            self._listen()
        self._last = max(self._last, step)

    def _histogram(self, tag: str, values: Array, step: int) -> None:
        values = values[np.isfinite(values)]
        if values.size:
            self._writer.add_histogram(_clean(tag), values, step)

    def _listen(self) -> None:
        """Take parts of the next gradient of each parameter, on rank 0."""
        self._silence()
        if self.writer is None:
            return
        self._gradients, self._since = {}, self.trainer.replica.steps + 1

        def hear(name: str, parameter: Any) -> None:
            def hook(_: Any) -> None:
                remove()
                self._gradients[name] = _some(parameter.grad)

            remove = parameter.on_gradient(hook)
            self._removers.append(remove)

        for name, parameter in self.trainer.model.named_parameters().items():
            if parameter.requires_grad:
                hear(name, parameter)

    def _silence(self) -> None:
        for remove in self._removers:
            remove()
        self._removers.clear()

    def flush(self) -> None:
        """Hand what was written so far to the file. Not collective."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file; whoever writes more begins another one. Not collective."""
        self._silence()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield what TensorBoard is to show of one record of a run, by tag."""
    between = record.get("kind") == "steps"
    which = "steps" if between else "epoch"
    for name in ("loss", "samples_per_second"):
        if name in record:
            yield f"{name}/{which}", float(record[name])
    for name, value in record.get("metrics", {}).items():
        yield _clean(f"test/{name}"), float(value)
    seconds = record.get("seconds") if between else record.get("phases")
    phases = {name: float(np.sum(spent)) for name, spent in dict(seconds or {}).items()}
    for name, spent in phases.items():
        tag = "phases_of_rank_0" if between else "phases"
        yield _clean(f"{tag}/{name}"), spent / (sum(phases.values()) or 1)
    for name, value in dict(record.get("noise") or {}).items():
        yield _clean(f"noise/{name}"), float(value)
    if record.get("peak_memory_bytes"):
        yield "memory/peak_bytes", float(max(record["peak_memory_bytes"]))
    if record.get("moved_bytes"):
        yield "moved_bytes/epoch", float(sum(record["moved_bytes"]))


def rates(optimizer: Groups, step: int) -> Iterator[tuple[str, float]]:
    """Yield the learning rate of the last of `step` updates, of each optimizer that has one."""
    groups = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    for pattern, one in groups.items():
        lr = getattr(one, "lr", None)
        if lr is not None:
            tag = "learning_rate" + f"/{pattern}".replace("*", "all") * bool(pattern)
            yield _clean(tag), rate(one, lr, max(0, step - 1))


def _some(values: Array) -> Array:
    """Return at most SAMPLES elements as float64 (n,) of their own."""
    each = -(-values.size // SAMPLES) or 1
    return np.array(to_numpy(values.reshape(-1)[::each]), np.float64)


def _clean(tag: str) -> str:
    return re.sub(r"[^-/\w.]", "_", tag, flags=re.ASCII)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for what SummaryWriter does, on ranks that do not write."""
