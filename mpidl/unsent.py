"""Objects that are sent to other ranks, and that may be such as cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mpidl.errors import InvalidArgument
from mpidl.marks import by_rank, shared

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(frozen=True)
class Unsent:
    """Comes in place of an object that cannot be pickled."""

    rank: int
    problem: str


def sent(MPI: Any, rank: int, send: Callable[[Any], list[T]], value: Any) -> list[T]:
    """Return the objects of all ranks that `send` returns; this one's is `value`. Collective.

    Raises InvalidArgument on every rank where any rank's object cannot be pickled: without this
    the others would wait for it.
    """
    try:
        found = send(value)
    except MPI.Exception:
        raise
    except Exception:
        try:
            MPI.pickle.dumps(value)  # which comes before anything is sent
        except Exception as error:  # of any class: objects decide how they are pickled
            problem = f"{type(value).__name__} cannot be pickled: {error}"
        else:
            raise
        found = send(Unsent(rank, problem))
    unsent = {one.rank: one.problem for one in found if isinstance(one, Unsent)}
    if unsent:
        raise shared(InvalidArgument(by_rank(unsent)))
    return found
