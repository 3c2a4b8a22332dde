"""Training that goes on after an error, from the last commit in memory; `hvd.elastic`.

For now over the ranks that there are: a failed operation is undone on all of them. Where ranks
come and go, `session.rebuild` is where the new set is to be found.
"""

from __future__ import annotations

import copy
import functools
import queue
from typing import TYPE_CHECKING, Any

import torch

from mpidl.torch import session as sessions
from mpidl.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from mpidl.torch.elastic_sampler import ElasticSampler
from mpidl.torch.errors import HorovodInternalError, HostsUpdatedInterrupt
from mpidl.torch.objects import broadcast_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]

FAILURES = 3  # without a commit between: then the error is one that comes again each time


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return `func(state, ...)` so that it begins again after what ranks can recover from.

    `state.sync()` comes before each beginning. After HorovodInternalError, `state.restore()` goes
    back to the last commit; after HostsUpdatedInterrupt nothing is lost. Then come the callbacks
    of `state.register_reset_callbacks`. Collective: the error must come on every rank, as those of
    the operations do. An error that comes FAILURES times, with no commit between, is raised.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        failures, commits, skip_sync = 0, state.commits, False
        while True:
            try:
                if not skip_sync:
                    state.sync()
                return func(state, *args, **kwargs)
            except HorovodInternalError:
                failures = failures + 1 if state.commits == commits else 1
                if failures >= FAILURES:
                    raise
                commits, skip_sync = state.commits, False
                state.restore()
            except HostsUpdatedInterrupt as interrupt:
                skip_sync = interrupt.skip_sync
            sessions.rebuild()
            state.on_reset()

    return wrapper


class State:
    """What training consists of at a moment; the base of those below.

    `bcast_object` gives rank 0's object to all, `get_rank` tells this process's rank.
    """

    def __init__(
        self,
        bcast_object: Callable[..., Any] = broadcast_object,
        get_rank: Callable[[], int] = sessions.rank,
    ) -> None:
        self._bcast_object, self._rank = bcast_object, get_rank
        self._callbacks: list[Callable[[], Any]] = []
        self._messages: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        self.commits = 0

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Call these after each reset, before the state is synchronized."""
        self._callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Do what is due after a reset. `run` calls it."""
        while not self._messages.empty():
            self._messages.get()
        self.reset()
        for callback in self._callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: Any = None) -> None:
        """Let the next check find that hosts came or will go. Not collective; any thread may."""
        self._messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Save the state in memory, and check for updates of hosts. Collective."""
        self.save()
        self.commits += 1
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raise HostsUpdatedInterrupt on every rank if rank 0 was told of one. Collective."""
        if self._bcast_object(not self._messages.empty()):
            raise HostsUpdatedInterrupt

    def save(self) -> None:
        """Keep a copy of the state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the copy."""
        raise NotImplementedError

    def sync(self) -> None:
        """Give all ranks rank 0's state. Collective."""
        raise NotImplementedError

    def reset(self) -> None:
        """Do what the state itself has to do after a reset."""


class ObjectState(State):
    """Objects, each an attribute of the name under which it is given."""

    def __init__(
        self,
        bcast_object: Callable[..., Any] = broadcast_object,
        get_rank: Callable[[], int] = sessions.rank,
        **kwargs: Any,
    ) -> None:
        super().__init__(bcast_object, get_rank)
        self._saved: dict[str, Any] = dict(kwargs)
        self.restore()
        self.save()

    def save(self) -> None:
        """Copy the attributes."""
        self._saved = {name: copy.deepcopy(getattr(self, name)) for name in self._saved}

    def restore(self) -> None:
        """Set the attributes to copies of what was saved."""
        for name, value in self._saved.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        """Give all ranks rank 0's attributes, as they are, and save them. Collective."""
        mine = {name: getattr(self, name) for name in self._saved}
        for name, value in self._bcast_object(mine).items():
            setattr(self, name, value)
        self.save()


class TorchState(ObjectState):
    """Models, optimizers, samplers and other objects, each an attribute.

    `model` and `optimizer` may be None; more of them, under other names, are among `kwargs`. What
    is a torch.nn.Module, a torch.optim.Optimizer or a sampler with a `state_dict` stays the same
    object, and its state comes and goes; anything else is copied.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        given = {"model": model, "optimizer": optimizer}
        kwargs = {k: v for k, v in given.items() if v is not None} | kwargs
        kept = {name: value for name, value in kwargs.items() if _has_state(value)}
        self._kept = dict.fromkeys(kept)  # name -> saved state
        for name, value in {**given, **kept}.items():
            setattr(self, name, value)
        super().__init__(**{k: v for k, v in kwargs.items() if k not in kept})

    def save(self) -> None:
        """Copy all of the state."""
        super().save()
        for name in self._kept:
            self._kept[name] = copy.deepcopy(getattr(self, name).state_dict())

    def restore(self) -> None:
        """Go back to the last commit."""
        super().restore()
        for name, state in self._kept.items():
            kept = getattr(self, name)
            if hasattr(kept, "forget"):
                kept.forget()
            if state is not None:
                kept.load_state_dict(copy.deepcopy(state))

    def sync(self) -> None:
        """Give all ranks rank 0's state, and save it. Collective."""
        for name in self._kept:
            kept = getattr(self, name)
            if isinstance(kept, torch.nn.Module):
                broadcast_parameters(kept.state_dict(), 0)
            elif isinstance(kept, torch.optim.Optimizer):
                broadcast_optimizer_state(kept, 0)
            else:
                kept.load_state_dict(self._bcast_object(kept.state_dict()))
        super().sync()

    def reset(self) -> None:
        """Let samplers deal the rest of the epoch out anew."""
        for name in self._kept:
            kept = getattr(self, name)
            if isinstance(kept, ElasticSampler):
                kept.reset()


def _has_state(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
