"""What `DataParallel` may be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.array import is_device
from mpidl.bucket import check_dtype
from mpidl.errors import InvalidArgument
from mpidl.nn.module import Module
from mpidl.optim.clip import Clip
from mpidl.refuse import told, whole

if TYPE_CHECKING:
    from mpidl.nn import Parameter
    from mpidl.world import World


def parameters_of(model: Any, world: World) -> dict[str, Parameter]:
    """Return the parameters of a model. Collective.

    Raises InvalidArgument on every rank where it is no `nn.Module`.
    """
    with world.together():
        if not isinstance(model, Module):
            raise InvalidArgument(f"expected a model, an nn.Module, found {told(model)}")
    return model.named_parameters()


def check_options(
    world: World,
    model: Module,
    optimizer: Any,
    *,
    clip: tuple[Any, Any],
    accumulate: Any,
    microbatches: Any,
    local_steps: Any,
    audit_every: Any,
    noise_every: Any,
    overlap: Any,
    bucket_bytes: Any,
) -> Clip:
    """Return the clip of (value, norm). Collective.

    Raises on every rank InvalidArgument where an option cannot be, and RankMismatch where the ranks
    differ in one.
    """
    with world.together():
        made = Clip(*clip)
        whole("audit_every", audit_every)
        whole("noise_every", noise_every)
        whole("accumulate", accumulate, 1)
        whole("local_steps", local_steps, 1)
        check_averaging(overlap, bucket_bytes)
        check_microbatches(model, microbatches, accumulate, local_steps)
    for option in (
        f"{bucket_bytes=}, {overlap=}, {local_steps=}, {audit_every=}, {noise_every=}",
        f"clip_norm={made.norm}, clip_value={made.value}, accumulate={accumulate}",
        f"optimizer={optimizer!r}",
    ):
        world.same(option, "DataParallel")
    return made


def check_microbatches(model: Module, number: Any, accumulate: int, local_steps: int) -> None:
    """Raise InvalidArgument where microbatches cannot go with the rest. Not collective."""
    if number is None:
        return
    problem = ""
    if accumulate > 1:
        problem = f"accumulate={accumulate}: ranks accumulate over their microbatches already"
    elif local_steps > 1:
        problem = f"local_steps={local_steps}, whose steps depend on the number of ranks"
    for name, module in model.named_modules().items():
        if module.sync:
            problem = f"layer {name or type(module).__name__} of sync=True: set sync=False"
    if problem:
        raise InvalidArgument(f"microbatches={number} with {problem}")


def check_averaging(overlap: Any, bucket_bytes: Any) -> None:
    """Raise InvalidArgument where one of them cannot be. Not collective."""
    if not isinstance(overlap, bool) and not _is_auto(overlap):
        raise InvalidArgument(f"overlap={told(overlap)}: expected 'auto', True or False")
    known = isinstance(bucket_bytes, int) and not isinstance(bucket_bytes, bool)
    if not (known and bucket_bytes > 0) and not _is_auto(bucket_bytes):
        raise InvalidArgument(
            f"bucket_bytes={told(bucket_bytes)}: expected 'auto' or a number of bytes"
        )


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def check_parameters(model: Module, world: World) -> None:
    """Compare parameters and buffers with rank 0's, all but their values. Collective.

    Raises on every rank RankMismatch where they differ, InvalidArgument where nothing is to train,
    and UnsupportedDtype.
    """
    every = model.named_parameters()
    mine = [
        f"{'frozen ' * (not p.requires_grad)}parameter {name} of shape {p.shape}, {p.dtype}, "
        + ("on the GPU" if is_device(p.data) else "on the CPU")
        for name, p in every.items()
    ]
    mine += [
        f"buffer {name} of shape {b.shape}, {b.dtype}" for name, b in model.named_buffers().items()
    ]
    with world.together():
        if not any(p.requires_grad for p in every.values()):
            frozen = " to train: all are frozen" if every else ""
            raise InvalidArgument(f"{type(model).__name__} has no parameters{frozen}")
        for name, p in every.items():
            if p.requires_grad:
                check_dtype(p.data, f"parameter {name}")
    world.same_lines(mine)
