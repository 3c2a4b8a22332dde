"""What is submitted, what is handed out for it, and what other ranks are told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import numpy as np

if TYPE_CHECKING:
    from mpidl.array import Array

OPS = ("average", "sum", "min", "max", "product", "adasum")
HALVES = ("float16", "bfloat16")
#: What each kind compares between ranks, besides kind, dtype and device.
COMPARED = {
    "allreduce": ("op", "prescale", "postscale", "shape"),
    "allgather": ("shape",),
    "broadcast": ("root", "shape"),
    "alltoall": ("shape",),
    "reducescatter": ("op", "prescale", "postscale", "shape"),
    "barrier": (),
}
#: Kinds whose first dimension may differ between ranks.
UNEQUAL = ("allgather", "alltoall")
#: What MPI reduces, by NumPy's `dtype.kind`; "V" stands for no array.
NUMBERS = "iufcb"

Key: TypeAlias = "tuple[int, str]"  # process set, name


@dataclass(slots=True)
class Request:
    """One rank's part in a collective operation of a process set.

    `array` is C-contiguous, of any shape; allreduce and broadcast change it in place, so it is to
    be left alone until the operation is done. bfloat16 comes as its bits, in an array of uint16.
    """

    name: str  #: the same on all ranks; one of a name at a time in a process set
    kind: str  #: a key of `COMPARED`
    array: Array | None = None  #: None for a barrier
    dtype: str = ""  #: "" for that of the array
    op: str = "sum"  #: one of `OPS`: of allreduce, and of reducescatter but for adasum
    root: int = 0  #: of broadcast: rank within the process set
    prescale: float = 1.0  #: multiplies what goes into a sum, in float32 for float16 and bfloat16
    postscale: float = 1.0  #: multiplies what comes out
    splits: tuple[int, ...] | None = None  #: of alltoall: rows for each rank; None for equal parts
    process_set: int = 0
    group: int | None = (
        None  #: those of one group are given in one `submit_all`, and start together
    )
    device: str = "cpu"  #: only compared
    problem: str | None = None  #: what this rank cannot do its part for: all ranks are told

    def scale(self, before: float, after: float, problem: str | None) -> None:
        """Set the factors, or note what is wrong with them."""
        self.prescale, self.postscale = before, after
        self.problem = self.problem or problem


@final
class Handle:
    """What `Engine.submit` returns: of an operation on its way, or done."""

    __slots__ = ("done", "error", "request", "result", "sizes")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = False
        self.error: BaseException | None = None
        self.result: Any = None
        self.sizes: tuple[int, ...] | None = None  #: rows by rank, of allgather and alltoall


class Description(NamedTuple):
    """What the other ranks need to know of a request."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    op: str
    root: int
    prescale: float
    postscale: float
    splits: tuple[int, ...] | None
    device: str
    problem: str | None = None  #: what is wrong with it whatever the others submit

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * storage(self.dtype).itemsize


class Item(NamedTuple):
    """A request, or a group of them, of one process set: the unit that ranks agree on."""

    process_set: int
    names: tuple[str, ...]
    descriptions: tuple[Description, ...]
    group: int | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        """Under which its requests are in flight."""
        return tuple((self.process_set, name) for name in self.names)


#: What must be as before for an id to stand for a request: all that a `Description` is made from.
signature = attrgetter(
    "kind", "dtype", "op", "root", "prescale", "postscale", "splits", "device",
    "array.dtype", "array.shape",
)  # fmt: skip


def storage(dtype: str) -> np.dtype[Any]:
    """Return the dtype of arrays that hold `dtype`: uint16 for the bits of bfloat16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def describe(request: Request, size: int) -> Description:
    """Return what to tell of a request to a process set of `size` ranks. Raises nothing."""
    array: Any = request.array
    dtype = request.dtype or str(getattr(array, "dtype", ""))
    factors = _number(request.prescale), _number(request.postscale)
    return Description(
        request.kind,
        dtype,
        tuple(getattr(array, "shape", ())),
        request.op,
        request.root,
        *factors,
        None if request.splits is None else tuple(request.splits),
        request.device,
        _problem(request, dtype, size, factors),
    )


def _number(factor: Any) -> float:
    try:
        return float(factor)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _problem(request: Request, dtype: str, size: int, factors: tuple[float, float]) -> str | None:
    """Return what cannot be in a request, whatever the other ranks submit."""
    kind, array = request.kind, request.array
    if request.problem is not None:
        return request.problem
    if kind not in COMPARED:
        return f"kind {kind!r}: expected one of {', '.join(COMPARED)}"
    if kind == "barrier":
        return None
    if not isinstance(array, np.ndarray):
        return f"{type(array).__name__}: expected a NumPy array"
    try:
        held = storage(dtype)
    except TypeError:
        held = None
    if held != array.dtype:
        return f"dtype {dtype} in an array of {array.dtype}: expected {held}"
    if array.dtype.hasobject:
        return f"dtype {dtype}: expected numbers"
    if not array.flags.carray and not (kind in UNEQUAL and array.flags.c_contiguous):
        return "an array that is read-only or has gaps: expected a C-contiguous one"
    if kind in ("allreduce", "reducescatter"):
        return _sum_problem(request, dtype, array, factors)
    if kind == "broadcast" and not 0 <= request.root < size:
        return f"root {request.root}: expected a rank from 0 to {size - 1} of the process set"
    if kind in UNEQUAL and not array.ndim:
        return "a number: expected an array of one dimension or more"
    if kind == "alltoall":
        return _splits_problem(request.splits, len(array), size)
    return None


def _sum_problem(
    request: Request, dtype: str, array: Array, factors: tuple[float, float]
) -> str | None:
    op, kind = request.op, array.dtype.kind
    if op not in OPS:
        return f"op {op!r}: expected one of {', '.join(OPS)}"
    if dtype not in HALVES and (
        kind not in NUMBERS or array.dtype.itemsize > 8 * (1 + (kind == "c"))
    ):
        return f"dtype {dtype}: MPI cannot sum it"
    if any(map(math.isnan, factors)):
        return f"factors {request.prescale!r} and {request.postscale!r}: expected numbers"
    if kind == "b" and (op == "average" or request.prescale != 1 or request.postscale != 1):
        return f"dtype bool: {op} with factors {request.prescale:g} and {request.postscale:g}"
    if kind == "c" and op in ("min", "max"):
        return f"dtype {dtype} has no {op}"
    if op == "adasum" and dtype not in ("float32", "float64", *HALVES):
        return f"dtype {dtype}: adasum is for floating-point numbers"
    if request.kind == "reducescatter":
        if op == "adasum":
            return "op adasum: reducescatter takes the others only"
        if not array.ndim:
            return "a number: expected an array of one dimension or more"
    return None


def _splits_problem(splits: tuple[int, ...] | None, rows: int, size: int) -> str | None:
    if splits is None:
        equal = rows % size == 0
        return None if equal else f"{rows} rows in {size} equal parts: give splits"
    if len(splits) != size or min(splits) < 0 or sum(splits) != rows:
        return f"splits {tuple(splits)}: expected {size} numbers, 0 or more, whose sum is {rows}"
    return None
