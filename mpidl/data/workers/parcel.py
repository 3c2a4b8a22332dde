"""A data set and a transform, packed once for all workers of a rank."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpidl.data.workers.script import Excerpt, excerpt
from mpidl.data.workers.slot import aligned, memory_file
from mpidl.errors import InvalidArgument


@dataclass(frozen=True)
class Item:
    """A pickled object. The arrays in it lie apart, in the parcel's memory (PEP 574)."""

    stream: bytes
    spans: list[tuple[int, int]]  #: first byte and length of each array


@dataclass(frozen=True)
class Parcel:
    """What `pack` makes: workers get the file's descriptor, and the rest by a message."""

    file: int
    item: Item
    excerpt: Excerpt | None

    def open(self, file: int) -> Any:
        """Return the objects; `file` is the descriptor by which this process knows the memory.

        Their arrays are the shared memory itself; what a process writes there, it alone sees.
        """
        size = os.fstat(file).st_size
        memory = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_COPY) if size else b"")

        def load(item: Item) -> Any:
            buffers = [memory[start : start + length] for start, length in item.spans]
            return pickle.loads(item.stream, buffers=buffers)

        if self.excerpt is not None:
            self.excerpt.restore(load)
        return load(self.item)


def pack(**objects: Any) -> Parcel:
    """Pack `objects`; a worker gets them as a tuple. The caller closes the parcel's `file`.

    Copies the arrays in them once, but not memory-mapped files: workers map those again. Raises
    InvalidArgument, with its name, for an object that cannot be sent.
    """
    buffers: list[tuple[int, memoryview]] = []
    end = 0

    def dump(value: Any) -> tuple[Item, set[str]]:
        nonlocal end
        stream = io.BytesIO()
        arrays: list[pickle.PickleBuffer] = []
        pickler = _Pickler(stream, 5, buffer_callback=arrays.append)
        pickler.dump(value)
        spans = []
        for raw in (array.raw() for array in arrays):
            buffers.append((end, raw))
            spans.append((end, raw.nbytes))
            end += aligned(raw.nbytes)
        return Item(stream.getvalue(), spans), pickler.of_main

    for name, value in objects.items():
        _try(name, value)
    item, names = dump(tuple(objects.values()))
    made = excerpt(names, dump)
    file = memory_file("mpidl-parcel")
    if end:
        os.ftruncate(file, end)
        with mmap.mmap(file, end) as memory:
            for start, raw in buffers:
                memory[start : start + raw.nbytes] = raw
    return Parcel(file, item, made)


def _try(name: str, value: Any) -> None:
    try:
        _Pickler(io.BytesIO(), 5, buffer_callback=lambda _: None).dump(value)
    except Exception as error:
        raise InvalidArgument(
            f"Loader: the {name} cannot be sent to a worker ({type(error).__name__}: {error}). "
            "Workers find functions and classes by their names: define them at the top level of a "
            "module or of the script, not by lambda or inside a function, and open files in "
            "`take`; or use workers=0, which sends nothing"
        ) from error


class _Pickler(pickle.Pickler):
    """Notes the names of `__main__` that are referred to; sends memory maps by their file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.of_main: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _mapped(value) or NotImplemented
        name = getattr(value, "__qualname__", None)
        if isinstance(name, str) and getattr(value, "__module__", None) == "__main__":
            self.of_main.add(name.split(".")[0])
        return NotImplemented


def _mapped(array: np.ndarray[Any, Any]) -> tuple[Any, ...] | None:
    """Return how to map the part of a file that `array` is; None where it is no such part."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    if owner is None or getattr(owner, "filename", None) is None or owner.mode == "c":
        return None  # "c": what was written there is in no file
    if not array.flags.forc or array.size == 0 or not Path(owner.filename).is_file():
        return None
    first = np.frombuffer(owner._mmap, np.uint8).ctypes.data
    offset = owner.offset - owner.offset % mmap.ALLOCATIONGRANULARITY + array.ctypes.data - first
    order = "C" if array.flags.c_contiguous else "F"
    return _map, (str(owner.filename), array.dtype, offset, array.shape, order)


def _map(path: str, dtype: Any, offset: int, shape: tuple[int, ...], order: Any) -> Any:
    return np.memmap(path, dtype, "r", offset, shape, order)
