"""Training that goes on from the last commit in memory, after an error or a rank's death.

`hvd.elastic`. A failed operation is undone on all ranks. Under `mpidl run --elastic` a rank that is
killed is left out: see `recovery`.
"""

from __future__ import annotations

import copy
import functools
import queue
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from mpidl.elastic import RankDied
from mpidl.errors import InvalidArgument
from mpidl.refuse import told
from mpidl.torch import recovery
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

    Under `mpidl run --elastic` ranks may be killed: those that are left go back to the last commit,
    and have other numbers from there on. What `state` holds is at work for them again, each
    `DataParallel` too; communicators of your own are to be made anew, by a callback, say.

    Raises InvalidArgument for a `func` that is none, or a `state` that is no State.
    """
    if not callable(func):
        raise InvalidArgument(f"elastic.run: expected a function, not {told(func)}")

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state, State):
            raise InvalidArgument(f"elastic.run: expected a State, not {told(state)}")
        sessions.init()
        recovery.check(state)
        failures, commits = 0, state.commits
        after, skip_sync = "", False  # what there is to recover from

        while True:
            try:
                if after == "death":
                    failures += not recovery.recover(state)  # where nobody has died
                elif after:
                    if after == "error":
                        state.restore()
                    sessions.rebuild()
                if after:
                    state.on_reset()
                if not skip_sync:
                    state.sync()
                after, skip_sync = "", False
                found = func(state, *args, **kwargs)
                recovery.agree()
                return found
            except HostsUpdatedInterrupt as interrupt:  # noqa: PERF203  # a `func`, not a step
                after, skip_sync = "hosts", interrupt.skip_sync
            except Exception as error:
                died = isinstance(error, RankDied) or recovery.died(error)
                if not died and not isinstance(error, HorovodInternalError):
                    raise
                after, skip_sync = "death" if died else "error", False
                if state.commits != commits:
                    failures, commits = 0, state.commits
                failures += not died
                if failures >= FAILURES:
                    raise

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
        """Save the state in memory, and check for updates of hosts. Collective.

        All ranks save it, or none: raises RankDied, for `run`, where one has died.
        """
        self._save_together()
        self.commits += 1
        self.check_host_updates()

    def _save_together(self) -> None:
        self.complete()
        recovery.agree()  # calls may have returned garbage here, and errors on other ranks
        self.save()

    def complete(self) -> None:
        """Bring to this rank what it has to save, and others have. Collective."""

    def replicas(self) -> list[Any]:
        """Return what is to be built anew after a death: each DataParallel of the state."""
        return []

    def optimizers(self) -> list[Any]:
        """Return the optimizers of the state."""
        return []

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
        self._save_together()


class TorchState(ObjectState):
    """Models, optimizers, samplers and other objects, each an attribute.

    `model` and `optimizer` may be None; more of them, under other names, are among `kwargs`. What
    is a torch.nn.Module (an `mpidl.torch.DataParallel` too), a torch.optim.Optimizer, or has a
    `state_dict`, as schedulers, samplers and `mpidl.torch.loader` have, stays the same object, and
    its state comes and goes; anything else is copied.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        given = {"model": model, "optimizer": optimizer}
        kwargs = {k: v for k, v in given.items() if v is not None} | kwargs
        kept = {name: value for name, value in kwargs.items() if _has_state(value)}
        self._kept = dict.fromkeys(kept)  # name -> saved state
        for name, value in {**given, **kept}.items():
            setattr(self, name, value)
        self.complete()
        super().__init__(**{k: v for k, v in kwargs.items() if k not in kept})

    def replicas(self) -> list[Any]:
        """Return each DataParallel of the state."""
        return [each for each in self._those_kept() if recovery.is_replica(each)]

    def optimizers(self) -> list[Any]:
        """Return the optimizers of the state."""
        return [each for each in self._those_kept() if isinstance(each, torch.optim.Optimizer)]

    def _those_kept(self) -> list[Any]:
        return [getattr(self, name) for name in self._kept]

    def complete(self) -> None:
        """Let this rank have all of the optimizers' state. Collective."""
        for replica in self.replicas():
            replica.gather_optimizer_state()

    def save(self) -> None:
        """Copy all of the state."""
        super().save()
        for name in self._kept:
            kept = getattr(self, name)
            place = kept.place if recovery.is_replica(kept) else None
            self._kept[name] = _copied(kept.state_dict()), place

    def restore(self) -> None:
        """Go back to the last commit."""
        super().restore()
        for name, saved in self._kept.items():
            kept = getattr(self, name)
            if hasattr(kept, "forget"):
                kept.forget()
            if saved is None:
                continue
            state, place = saved
            kept.load_state_dict(_copied(state))
            if place is not None:
                kept.place = place

    def sync(self) -> None:
        """Give all ranks rank 0's state, and save it. Collective."""
        self.complete()
        for kept in self._those_kept():
            if isinstance(kept, torch.nn.Module):
                broadcast_parameters(kept.state_dict(), 0)
                if recovery.is_replica(kept):
                    kept.place = self._bcast_object(kept.place)
            elif isinstance(kept, torch.optim.Optimizer):
                broadcast_optimizer_state(kept, 0)
            else:
                kept.load_state_dict(self._bcast_object(kept.state_dict()))
        super().sync()

    def reset(self) -> None:
        """Let samplers deal the rest of the epoch out anew."""
        for kept in self._those_kept():
            if isinstance(kept, ElasticSampler):
                kept.reset()


def _has_state(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _copied(state: Any) -> Any:
    """Return a copy of a state; of a tensor, without the rest of the bucket that it is in."""
    memo: dict[int, Any] = {}
    for value in pytree.tree_leaves(state):
        if torch.is_tensor(value):
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(state, memo)
