"""What `DataParallel` may be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.array import is_device
from mpidl.bucket import check_dtype
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from mpidl.nn import Module
    from mpidl.world import World


def check_options(
    accumulate: Any, local_steps: Any, overlap: Any, bucket_bytes: Any, audit_every: Any
) -> None:
    """Raise InvalidArgument where one of them cannot be. Not collective."""
    if audit_every != int(audit_every) or audit_every < 0:
        raise InvalidArgument(f"{audit_every=}: expected a whole number; 0 for never")
    for name, number in (("accumulate", accumulate), ("local_steps", local_steps)):
        if number != int(number) or number < 1:
            raise InvalidArgument(f"{name}={number}: expected a whole number from 1 on")
    check_averaging(overlap, bucket_bytes)


def check_averaging(overlap: Any, bucket_bytes: Any) -> None:
    """Raise InvalidArgument where one of them cannot be. Not collective."""
    if overlap not in ("auto", True, False):
        raise InvalidArgument(f"{overlap=}: expected 'auto', True or False")
    if bucket_bytes != "auto" and not (isinstance(bucket_bytes, int) and bucket_bytes > 0):
        raise InvalidArgument(f"{bucket_bytes=}: expected 'auto' or a number of bytes")


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
