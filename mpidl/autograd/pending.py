"""Tensors whose values are still on their way: whoever reads them waits."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mpidl.array import Array
    from mpidl.autograd.variable import Variable


def defer(tensor: Variable, arrive: Callable[[], None]) -> None:
    """Let whoever next reads, or replaces, the `data` of `tensor` call `arrive` first.

    Until that returns, `tensor` is of a subclass of its class with another `data`: at any other
    time this costs nothing. Where `arrive` raises, the tensor stays as it is.
    """
    settle(tensor)
    tensor.arrive = arrive
    kind: Any = type(tensor)
    tensor.__class__ = _pending(kind)


def defer_each(
    groups: Iterable[Iterable[Variable]], arrivals: Iterable[Callable[[], None]]
) -> None:
    """`defer` all tensors of each group, whose data arrive at once."""
    for group, arrive in zip(groups, arrivals, strict=True):
        for tensor in group:
            defer(tensor, arrive)


def settle(tensor: Variable) -> None:
    """Undo `defer`."""
    kind = getattr(type(tensor), "_settled", None)
    if kind is not None:
        tensor.__class__ = kind
        with suppress(AttributeError):  # another thread did it
            del tensor.arrive


@cache
def _pending(kind: Any) -> Any:
    def wait(tensor: Variable) -> Variable:
        arrive = getattr(tensor, "arrive", None)
        if arrive is not None:  # nor has another thread waited
            arrive()
        settle(tensor)
        return tensor

    def read(tensor: Variable) -> Array:
        return wait(tensor).data

    def write(tensor: Variable, data: Array) -> None:
        wait(tensor).data = data

    def reduce(tensor: Variable, protocol: Any) -> Any:  # a copy is not pending
        return wait(tensor).__reduce_ex__(protocol)

    body = {"data": property(read, write), "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), {"__slots__": (), "_settled": kind, **body})
