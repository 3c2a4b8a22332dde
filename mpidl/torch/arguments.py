"""What the functions of mpidl.torch may be given. Nothing here is collective."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from mpidl import refuse
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import WRONG as OF_PYTHON
from mpidl.refuse import is_real, told, whole, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Tensor = Any
P = ParamSpec("P")
T = TypeVar("T")

#: What Python and torch raise for a value of a wrong type, shape or size.
WRONG = (*OF_PYTHON, RuntimeError)


def ours(error: Exception) -> MpidlError:
    """Return an error of a context in which no other rank is waited for as one of mpidl."""
    return error if isinstance(error, MpidlError) else wrong(error)


def refuses(function: Callable[P, T]) -> Callable[P, T]:
    """Let a constructor raise InvalidArgument where arguments make torch raise RuntimeError."""

    @refuse.refuses
    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except RuntimeError as error:
            raise ours(error) from error

    return run


def flag(what: str, value: Any) -> bool:
    """Return True or False. Raises InvalidArgument for others."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{what}={told(value)}: expected True or False")
    return value


def number(what: str, value: Any, least: float = -math.inf) -> float:
    """Return a finite number of `least` or more. Raises InvalidArgument for others."""
    if not is_real(value) or not math.isfinite(value) or value < least:
        expected = "a finite number" + f" from {least:g} on" * (least > -math.inf)
        raise InvalidArgument(f"{what}={told(value)}: expected {expected}")
    return float(value)


def factors(before: Any, after: Any) -> tuple[float, float, str | None]:
    """Return the factors of a sum as Python's numbers, and what is wrong with them, if anything.

    Those of tensors () are numbers, too. What is none becomes NaN.
    """
    found = []
    for value in (before, after):
        known = value
        if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_meta:
            known = value.item()
        with suppress(OverflowError):
            found.append(float(known) if is_real(known) else math.nan)
    if len(found) == 2 and not any(map(math.isnan, found)):
        return found[0], found[1], None
    return math.nan, math.nan, f"factors {told(before)} and {told(after)}: expected numbers"


def text(what: str, value: Any) -> str:
    """Return a text. Raises InvalidArgument for others."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{what}={told(value)}: expected a text")
    return value


def wholes(what: str, values: Any) -> list[int]:
    """Return a list, a vector or a range of whole numbers as a list of Python's.

    Raises InvalidArgument for others.
    """
    if isinstance(values, (np.ndarray, torch.Tensor)):
        try:
            values = values.tolist()
        except WRONG:  # of a tensor that has no values, say
            values = None
    if not isinstance(values, (list, tuple, set, frozenset, range)):
        raise InvalidArgument(f"{what}={told(values)}: expected whole numbers")
    return [whole(f"{what}: {told(value)}", value) for value in values]


def is_communicator(value: Any) -> bool:
    """Tell whether this is an mpi4py communicator."""
    return hasattr(value, "Get_rank") and not isinstance(value, type)


def several(what: str, tensors: Any) -> list[Tensor]:
    """Return a list of one tensor or more. Raises InvalidArgument for others, and for a tensor."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise InvalidArgument(
            f"{what}: expected a list of at least one tensor, not {told(tensors)}"
        )
    return list(tensors)


def module(what: str, value: Any) -> Any:
    """Return a module. Raises InvalidArgument for others."""
    if not isinstance(value, torch.nn.Module):
        raise InvalidArgument(f"{what}: expected a torch.nn.Module, not {told(value)}")
    return value


def length(what: str, dataset: Any) -> int:
    """Return the number of samples. Raises InvalidArgument for what has none."""
    try:
        return len(dataset)
    except WRONG as error:
        raise InvalidArgument(f"{what}: expected a data set, not {told(dataset)}") from error


def groups(optimizer: Any) -> list[list[Tensor]]:
    """Return the parameters of an optimizer's groups. Raises InvalidArgument for what is none."""
    try:
        found: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
    except WRONG:
        found = [[None]]
    if isinstance(optimizer, type) or not all(torch.is_tensor(p) for g in found for p in g):
        raise InvalidArgument(f"expected an optimizer of torch.optim, not {told(optimizer)}")
    return found


def check_replica(optimizer: Any, asked: Any, batch_dim: Any) -> None:
    """Raise InvalidArgument where options of a DataParallel cannot be."""
    if optimizer is not None:
        groups(optimizer)
    if asked.by_element is not None:
        flag("by_element", asked.by_element)
    flag("broadcast_buffers", asked.broadcast_buffers)
    if batch_dim is not None:
        whole("batch_dim", batch_dim)
    if asked.microbatches is not None:
        whole("microbatches", asked.microbatches, 1)
    whole("noise_every", asked.noise_every)


def rows(inputs: Any, batch_dim: int | None) -> float:
    """Return the rows of the first tensor among `inputs`; 1 where samples do not count."""
    if batch_dim is None:
        return 1.0
    for value in pytree.tree_leaves(inputs):
        if torch.is_tensor(value) and value.ndim > batch_dim:
            return float(value.shape[batch_dim])
    return 1.0


def compressor(value: Any) -> Any:
    """Return what has `compress` and `decompress`. Raises InvalidArgument for others."""
    if not all(callable(getattr(value, name, None)) for name in ("compress", "decompress")):
        raise InvalidArgument(f"compression={told(value)}: expected one of Compression")
    return value


def dense(tensor: Any) -> None:
    """Raise InvalidArgument for what is no dense tensor that has values."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        what = getattr(tensor, "layout", type(tensor).__name__)
        raise InvalidArgument(f"expected a dense torch.Tensor, not {what}")
    if torch.nn.parameter.is_lazy(tensor):
        raise InvalidArgument("expected a torch.Tensor, not one that has no shape yet")
    if tensor.is_meta:
        raise InvalidArgument("a tensor on the device meta, which has no values")


def writable(tensor: Tensor) -> None:
    """Raise InvalidArgument for a dense tensor of which several elements share memory."""
    if tensor.is_contiguous():
        return
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            raise InvalidArgument(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}, whose "
                "elements share memory, cannot be changed in place: clone() it"
            )
        reach += stride * (size - 1)


def each_once(what: str, names: Iterable[Any]) -> list[str]:
    """Return names that differ. Raises InvalidArgument for others."""
    found = [text(what, name) for name in names]
    if len(set(found)) < len(found):
        twice = sorted({name for name in found if found.count(name) > 1})
        raise InvalidArgument(f"{what}: expected each name once, not {', '.join(twice)}")
    return found
