"""Equal starts: parameters and the state of optimizers, from one rank to all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mpidl.errors import InvalidArgument, MpidlError, RankMismatch
from mpidl.torch import session as sessions
from mpidl.torch.arguments import WRONG, dense, each_once, groups, ours, writable
from mpidl.torch.errors import internal
from mpidl.torch.objects import broadcast_object
from mpidl.torch.ops import broadcast_async_, synchronize
from mpidl.torch.process_sets import global_process_set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Tensor = Any


class _Place(NamedTuple):
    """Where a tensor was in a structure that was sent without its tensors."""

    shape: tuple[int, ...]
    dtype: Any


def broadcast_parameters(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | Tensor], root_rank: int = 0
) -> None:
    """Copy rank `root_rank`'s tensors into those of all others, in place. Collective.

    `params` is a state_dict, or what named_parameters() or parameters() give. What is no tensor,
    and a parameter that has no shape yet, is left out. Raises RankMismatch on every rank, before
    anything is changed, where names, shapes or dtypes differ; InvalidArgument for what is none of
    these.
    """
    session = sessions.active()
    named, problem = [], None
    with internal():
        try:
            named = _named(params)
        except (MpidlError, *WRONG) as error:
            problem = ours(error)
        session.agree(problem, "broadcast_parameters.begin")
        layout = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in named]
        first = broadcast_object(layout, root_rank, "broadcast_parameters")
        pairs = zip(
            layout + ["no more"] * len(first), first + ["no more"] * len(layout), strict=False
        )
        differs = next((f"{a}, but rank {root_rank} has {b}" for a, b in pairs if a != b), None)
        problem = None if differs is None else RankMismatch(differs)
        session.agree(problem, "broadcast_parameters.agree")
    handles = [broadcast_async_(t, root_rank, f"broadcast.{name}") for name, t in named]
    for handle in handles:
        synchronize(handle)


def broadcast_optimizer_state(
    optimizer: Any,
    root_rank: int = 0,
    model: Any = None,  # noqa: ARG001
) -> None:
    """Give all ranks rank `root_rank`'s state and hyperparameters of an optimizer. Collective.

    For all of torch.optim, before the first step too, and however much state the ranks have: the
    others load what the root has, and parameters stay as they are. `model` is there for Horovod's
    sake. Raises InvalidArgument on every rank for what is no optimizer, and where the groups hold
    different numbers of parameters.
    """
    session = sessions.active()
    problem, tensors, mine = None, list[Tensor](), None
    state: Any = {}
    sizes: list[int] = []
    with internal():
        try:
            root = global_process_set.place(root_rank) == session.world.rank
            groups(optimizer)
            state = optimizer.state_dict()
            sizes = [len(group["params"]) for group in state["param_groups"]]
            mine = (sizes, _without(state, tensors)) if root else None
        except (MpidlError, *WRONG) as error:
            problem = ours(error)
        session.agree(problem, "broadcast_optimizer_state.begin")
    sent = broadcast_object(mine, root_rank, "broadcast_optimizer_state")
    here = [sizes, sent[0]]
    with internal():
        text = f"groups of {here[0]} parameters, but rank {root_rank} has {here[1]}"
        session.agree(
            InvalidArgument(text) if here[0] != here[1] else None,
            "broadcast_optimizer_state.agree",
        )
    if not root:
        state = _with(sent[1], tensors)
    handles = [
        broadcast_async_(tensor, root_rank, f"broadcast.optimizer.{i}")
        for i, tensor in enumerate(tensors)
    ]
    for handle in handles:
        synchronize(handle)
    if not root:
        optimizer.load_state_dict(state)


def _named(params: Any) -> list[tuple[str, Tensor]]:
    """Return names and tensors. Raises InvalidArgument for what has none."""
    if isinstance(params, torch.Tensor):  # rows of it are no parameters
        params = [None]
    items = list(params.items() if hasattr(params, "items") else params)
    named = []
    for i, item in enumerate(items):
        pair = item if isinstance(item, tuple) and len(item) == 2 else (str(i), item)
        name, tensor = pair
        if not isinstance(item, (tuple, torch.Tensor)) or isinstance(name, torch.Tensor):
            raise InvalidArgument(
                f"broadcast_parameters: {type(item).__name__}: expected a state_dict, "
                "named_parameters() or parameters()"
            )
        if isinstance(tensor, torch.Tensor) and not _lazy(tensor):
            dense(tensor)
            writable(tensor)
            named.append((str(name), tensor))
    each_once("broadcast_parameters", [name for name, _ in named])
    return named


def _lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)


def _without(value: Any, tensors: list[Tensor]) -> Any:
    """Return a structure with its tensors replaced by places, and append these to `tensors`."""

    def take(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        tensors.append(tensor)
        return _Place(tuple(tensor.shape), tensor.dtype)

    return _mapped(value, take)


def _with(value: Any, tensors: list[Tensor]) -> Any:
    """Return the structure with new tensors, on the CPU, in the places."""

    def make(place: Any) -> Any:
        if not isinstance(place, _Place):
            return place
        tensors.append(torch.empty(place.shape, dtype=place.dtype))
        return tensors[-1]

    return _mapped(value, make)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a structure of dicts, lists and tuples with each leaf changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
