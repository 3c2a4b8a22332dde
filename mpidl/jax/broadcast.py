"""One rank's pytree, on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from mpidl import packed
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.jax.leaves import as_numpy, flatten, is_key, is_traced, like
from mpidl.world import current

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.jax.leaves import Tree


def broadcast(tree: Tree, root: int = 0) -> Tree:
    """Return rank `root`'s values of each leaf, as a new pytree: for equal starts. Collective.

    `tree` has leaves of any dtype, random keys too, of the same paths, shapes and dtypes on every
    rank: parameters, an optimizer's state.

    Raises on every rank InvalidArgument inside `jax.jit`, for what is no array, and for a `root`
    that is no rank; RankMismatch where roots, paths, shapes or dtypes differ.
    """
    leaves, structure = flatten(tree, "tree")
    arrays: dict[str, Array] = {}
    problem: MpidlError | None = None
    try:
        if is_traced(leaves.values()):
            raise InvalidArgument("mpidl.jax.broadcast inside a compiled function: call it before")
        arrays = {name: as_numpy(leaf, name) for name, leaf in leaves.items()}
    except MpidlError as error:
        problem = error
    copies = packed.broadcast(arrays, root, current(), problem)
    values = [
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if is_key(leaf) else x
        for x, leaf in zip(copies, leaves.values(), strict=True)
    ]
    return jax.tree.unflatten(structure, like(values, leaves.values()))
