"""`mpidl.range`: names for parts of a script, in its trace."""

from __future__ import annotations

import inspect
from functools import wraps
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from mpidl.errors import InvalidArgument
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.trace.recorder import Recorder

    Function = TypeVar("Function", bound=Callable[..., Any])

AVERAGE = "mpidl.average"  # the range of each call
recorder: Recorder | None = None  #: None where nothing is recorded


class range:  # noqa: A001, N801  # named as it is used: mpidl.range("augment")
    """Names what happens in a `with`, or in a function that it decorates, in the trace.

    In any thread, one in another as one likes; each thread has a track of its own. Where nothing
    is recorded (`mpidl run --trace`) it does nothing, within a fraction of a microsecond.
    Raises InvalidArgument for a name that is no text, and for a function that is run in pieces: a
    generator or a coroutine. Not collective.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise InvalidArgument(f"range({told(name)}): expected a name")
        self._name = name

    def __enter__(self) -> None:
        if recorder is not None:
            recorder.enter(self._name)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if recorder is not None:
            recorder.leave(self._name)

    def __call__(self, function: Function) -> Function:
        """Return `function`, each call of which is such a range."""
        pieces = (inspect.isgeneratorfunction, inspect.iscoroutinefunction,
                  inspect.isasyncgenfunction)  # fmt: skip
        if not callable(function) or any(runs_in(function) for runs_in in pieces):
            raise InvalidArgument(
                f"range({told(self._name)}) of {told(function)}: expected a function that runs "
                "through: no generator and no coroutine"
            )
        name = self._name

        @wraps(function)
        def named(*args: Any, **options: Any) -> Any:
            found = recorder
            if found is None:
                return function(*args, **options)
            found.enter(name)
            try:
                return function(*args, **options)
            finally:
                found.leave(name)

        return named  # type: ignore[return-value]


def spanned(name: str, begin: float, nbytes: float = 0.0) -> None:
    """Note what this thread has done from `begin` on, by `time.perf_counter`, up to now."""
    if recorder is not None:
        recorder.span(name, begin, perf_counter(), nbytes)
