"""In which way operations run: recorded or not, observed or not. Each thread has its own."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    #: `observer(name, inputs, options, result, push)` returns what is to stand for the result.
    Observer: TypeAlias = Callable[..., Any]


class Mode(NamedTuple):
    """How operations run; one object, so that an operation asks once."""

    recording: bool = True
    observer: Observer | None = None


_mode = ContextVar("mode", default=Mode())  # noqa: B039  # a tuple, which nobody can change

#: Return the mode of this thread.
mode: Callable[[], Mode] = _mode.get


def recording() -> bool:
    """Tell whether operations are being recorded for `backward`."""
    return _mode.get().recording


def no_grad() -> AbstractContextManager[None]:
    """Inside this context operations are not recorded: their results need no gradient."""
    return recorded(False)


@contextmanager
def recorded(value: bool) -> Iterator[None]:
    """Inside this context operations are recorded, or not."""
    token = _mode.set(_mode.get()._replace(recording=value))
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def observed(by: Observer) -> Iterator[None]:
    """Inside this context each operation's result is what `by` makes of it."""
    before = _mode.get()

    def both(name: str, inputs: Any, options: Any, result: Any, push: Any) -> Any:
        if before.observer is not None:
            result = before.observer(name, inputs, options, result, push)
        return by(name, inputs, options, result, push)

    token = _mode.set(before._replace(observer=both))
    try:
        yield
    finally:
        _mode.reset(token)
