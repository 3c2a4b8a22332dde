"""At the boundary: what Python and NumPy say of wrong arguments becomes an error of ours."""

from __future__ import annotations

from functools import wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mpidl.errors import InvalidArgument, MpidlError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

#: What Python, NumPy and their like raise for a value of a wrong type, shape or size.
WRONG = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


def refuses(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` raise InvalidArgument, with their words, where arguments make it raise WRONG.

    For functions that call nobody else's code, and take no part in each step: constructors, checks.
    A missing or an unknown argument stays Python's own TypeError.
    """

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except MpidlError:
            raise
        except WRONG as error:
            trace = error.__traceback__
            if isinstance(error, TypeError) and (trace is None or trace.tb_next is None):
                raise  # the function has not begun
            who = function.__qualname__.removesuffix(".__init__").removesuffix(".__post_init__")
            raise InvalidArgument(f"{who}: {type(error).__name__}: {error}") from error

    return run


def wrong(error: Exception) -> InvalidArgument:
    """Return what Python or NumPy says of an argument as an error of ours."""
    made = InvalidArgument(f"{type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def is_whole(value: object) -> bool:
    """Tell whether this is a whole number, Python's or another's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Tell whether this is a real number, NaN too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(what: str, value: Any, least: int = 0) -> int:
    """Return a whole number of `least` or more as Python's. Raises InvalidArgument for others."""
    if not is_whole(value) or value < least:
        raise InvalidArgument(f"{what}={told(value)}: expected a whole number from {least} on")
    return int(value)


def told(value: object, limit: int = 200, form: Callable[[object], str] = repr) -> str:
    """Return the repr of anything, also of what has none; cut where it is long."""
    try:
        text = form(value)
    except Exception:  # a list of a thousand lists in each other, or somebody's own class
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
