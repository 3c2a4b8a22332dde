"""Data parallelism as a gradient transformation, for Optax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from mpidl.errors import InvalidArgument
from mpidl.jax.average import average
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.jax.leaves import Tree


class GradientTransformation(NamedTuple):
    """What Optax calls by that name, for where it is not installed."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def data_parallel(tx: Any, *, weight: Any = 1.0) -> Any:
    """Return `tx`, an Optax transformation, on gradients averaged over ranks.

    Each rank gives the gradients of its part of the batch to `update(gradients, state, params)`,
    and gets the updates of the whole; that is collective, inside `jax.jit` or outside. `weight` is
    what this rank's part counts, as in `average`; `update(..., weight=...)` says so for one step.
    Clipping in `tx` then sees the whole gradient. With equal parameters at the start
    (`mpidl.jax.broadcast`) ranks stay equal.

    The result is an optax.GradientTransformationExtraArgs; without Optax a tuple of `init` and
    `update`. Raises InvalidArgument for a `tx` that is none.
    """
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise InvalidArgument(f"data_parallel({told(tx)}): expected an Optax transformation")
    default = weight

    def update(
        gradients: Tree, state: Tree, params: Tree = None, *, weight: Any = default, **extra: Any
    ) -> tuple[Tree, Tree]:
        return tx.update(average(gradients, weight=weight), state, params, **extra)

    try:
        made = importlib.import_module("optax").GradientTransformationExtraArgs
    except ImportError:
        made = GradientTransformation
    return made(tx.init, update)
