"""One call with arguments of which some are hostile, and what may come of it."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpidl.autograd import Tensor
from mpidl.errors import MpidlError
from tests.fuzz import names

SECONDS = 60  # that one call may take: then the process ends, with a traceback
MOST = 20  # elements that are taken from what yields without end
JOURNAL_BYTES = 4096
#: What takes long for a reason: the numeric checker computes the function twice an element, and
#: there are millions of arrays, or of batches, to put together.
LONG = {
    (name, "broadcast_to(1, 2**22)")
    for name in (
        "autograd.check:check_gradients",
        "functional:concatenate",
        "functional:stack",
        "torch.sampler:loader",
    )
}

#: What does as many times as it is told.
COUNTS = {("trainer:Trainer.fit", 2): 3, ("testing.faults:Corrupt", 2): 99}


class Given(NamedTuple):
    """Valid arguments of a function."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    kept: int  #: so many of `args` are never replaced
    close: Callable[[], None]
    then: Callable[[Any], Any] | None
    callbacks: tuple[int | str, ...] = ()  #: a function given there may raise what it likes
    theirs: tuple[int | str, ...] = ()  #: what is given there is for somebody else to refuse
    refused: bool = False  #: also as it is, on one rank


def given(*args: Any, **options: Any) -> Given:
    """Arguments of a function, all of which may be replaced."""
    return Given(args, options, 0, _nothing, None)


def on(instance: Any, *args: Any, **options: Any) -> Given:
    """Arguments of a method; the object itself is never replaced."""
    return Given((instance, *args), options, 1, _nothing, None)


def _nothing() -> None:
    pass


class Escaped(AssertionError):
    """An error that no docstring tells of."""


class Journal:
    """The call under way, in a file that outlives a crash of this process."""

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(JOURNAL_BYTES)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), JOURNAL_BYTES)

    def note(self, text: str) -> None:
        line = text.encode("utf-8", "backslashreplace")[: JOURNAL_BYTES - 1]
        self._map[: len(line) + 1] = line + b"\0"

    @staticmethod
    def read(path: Path) -> str:
        return path.read_bytes().split(b"\0")[0].decode(errors="replace")


def slots(made: Given) -> list[int | str]:
    """Return the arguments that may be replaced: places and names. Not a world: users make none."""
    return [*range(made.kept, len(made.args)), *(name for name in made.options if name != "world")]


def check(
    name: str,
    make: Callable[[], Given],
    hostile: Mapping[int | str, tuple[str, Callable[[], Any]]],
    journal: Journal,
) -> None:
    """Call the function `name` with hostile arguments in some slots. Raises Escaped.

    What it returns is gone through: iterators are run, contexts entered, tensors differentiated.
    """
    if any(is_long(name, slot, label, value()) for slot, (label, value) in hostile.items()):
        return
    function = names.resolve(name)
    made = make()
    try:
        args, options = list(made.args), dict(made.options)
        replaced = {slot: value() for slot, (_, value) in hostile.items()}
        for slot, value in replaced.items():
            if isinstance(slot, int):
                args[slot] = value
            else:
                options[slot] = value
        text = f"{name} with " + ", ".join(f"{s}={label}" for s, (label, _) in hostile.items())
        journal.note(text)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            try:
                result = function(*args, **options)
                _go_through(result)
                if made.then is not None:
                    _go_through(made.then(result))
            except (MpidlError, MemoryError):
                pass
            except TypeError as error:
                if _may_raise(made, replaced):
                    return
                if not _of_the_call(error):
                    raise Escaped(f"{text}: {type(error).__name__}: {error}") from error
            except Exception as error:
                if _may_raise(made, replaced):
                    return
                raise Escaped(f"{text}: {type(error).__name__}: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        made.close()


def _may_raise(made: Given, replaced: Mapping[int | str, Any]) -> bool:
    """Whether what was replaced went to functions that are not mpidl's."""
    return any(
        slot in made.theirs or (slot in made.callbacks and callable(value))
        for slot, value in replaced.items()
    )


def is_long(name: str, slot: int | str, label: str, value: Any) -> bool:
    """Whether the call would do what it is told, and take very long over it."""
    most = COUNTS.get((name, slot))
    if most is not None and isinstance(value, (int, float)) and value > most:
        return True
    return (name, label) in LONG


def _of_the_call(error: BaseException) -> bool:
    """Whether Python itself refused the arguments: the function never ran."""
    trace = error.__traceback__
    return trace is not None and trace.tb_next is None and "argument" in str(error)


def _go_through(result: Any) -> None:
    if isinstance(result, contextlib.AbstractContextManager) and not isinstance(result, type):
        if isinstance(result, contextlib._GeneratorContextManager):
            with result:
                pass
    elif isinstance(result, Iterator):
        for number, _ in enumerate(result):
            if number > MOST:
                break
    elif isinstance(result, Tensor) and result.node is not None and result.size:
        result.sum().backward()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is called may print; nobody is to read it."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
