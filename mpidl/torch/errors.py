"""Horovod's names for what may go wrong; they are mpidl's errors too, and RuntimeErrors."""

from __future__ import annotations

from typing import Any

from mpidl.errors import MpidlError


class HorovodInternalError(MpidlError, RuntimeError):
    """A collective operation failed. `elastic.run` goes back to the last commit, and goes on.

    What the operations raise is of this class and of mpidl's own: a RankMismatch, say, can be
    caught as RankMismatch, as HorovodInternalError and as RuntimeError.
    """


class HostsUpdatedInterrupt(RuntimeError):
    """Hosts came or will go: `elastic.run` begins again, without going back to the last commit.

    With `skip_sync` the state needs no broadcast: nobody is new.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the set of hosts has changed")
        self.skip_sync = skip_sync


def on_all(error: MpidlError) -> MpidlError:
    """Return `error` as one that all ranks raise."""
    error.collective = True
    return error


_classes: dict[type[MpidlError], type[HorovodInternalError]] = {}


def as_internal(error: MpidlError) -> HorovodInternalError:
    """Return `error` as one that is a HorovodInternalError besides."""
    if isinstance(error, HorovodInternalError):
        return error
    kind: Any = type(error)
    if kind not in _classes:
        body = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _classes[kind] = type(kind.__name__, (HorovodInternalError, kind), body)
    made = _classes[kind](*error.args)
    made.collective = error.collective
    return made


class internal:  # noqa: N801
    """A context whose MpidlErrors are raised as HorovodInternalErrors."""

    __slots__ = ()  # and no generator: it is entered with each operation

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MpidlError):
            raise as_internal(error) from error
