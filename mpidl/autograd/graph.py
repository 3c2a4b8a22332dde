"""`survey`: the recorded graph behind a tensor as a list, with the shapes that no node keeps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpidl import array
from mpidl.autograd.tape import Node, _walking
from mpidl.errors import AutogradError
from mpidl.refuse import told

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.autograd.tape import Adjoint
    from mpidl.autograd.variable import Variable


class Vertex(NamedTuple):
    """An operation, or a leaf."""

    name: str  #: of the operation, as in `OPS`; "" for a leaf
    source: Any  #: the operation's `Node`, or the leaf itself
    inputs: tuple[int, ...]  #: what it was computed from, as places in the list
    shape: tuple[int, ...] | None  #: of its result; None where it cannot be known
    dtype: np.dtype[Any] | None
    freed: bool = False  #: an earlier backward took what lay behind it


def survey(tensor: Variable) -> list[Vertex]:
    """Return what `tensor` was computed from, inputs before results; itself comes last.

    Only what needs a gradient is recorded. Nodes keep no shapes, so that operations cost nothing
    for this; a walk back with gradients of zeros tells them, and takes as long as one backward.
    The graph stays as it is, leaves receive nothing. Not collective.

    Raises AutogradError for a tensor without a graph, and where an earlier backward freed it.
    """
    root = tensor.node
    if root is None:
        raise AutogradError("draw: this tensor depends on nothing that requires a gradient")
    start = root if isinstance(root, Node) else tensor
    with _walking, np.errstate(all="ignore"):  # where another walk is, edges come and go
        if isinstance(root, Node) and root.edges is None:
            raise AutogradError(
                f"draw: an earlier backward freed the graph of this {root.name}; draw before "
                "backward, or run the forward pass again"
            )
        order = _order(start, array.namespace(tensor.data).zeros_like(tensor.data))
        places = {id(source): i for i, (source, _, _) in enumerate(order)}
        return [_vertex(*one, places) for one in order]


def _vertex(source: Any, shape: Any, dtype: Any, places: dict[int, int]) -> Vertex:
    inputs = tuple(places[id(parent)] for parent, _ in _edges(source))
    is_node = source.__class__ is Node
    freed = is_node and source.edges is None
    return Vertex(source.name if is_node else "", source, inputs, shape, dtype, freed)


def _edges(source: Any) -> list[tuple[Any, Adjoint]]:
    return (source.edges or []) if source.__class__ is Node else []


def _order(start: Any, like: Array) -> list[tuple[Any, Any, Any]]:
    """Return all sources, inputs first, each with its result's shape and dtype."""
    uses: Counter[int] = Counter()
    sources = [start]
    for source in sources:  # grows on the way
        for parent, _ in _edges(source):
            if id(parent) not in uses:
                sources.append(parent)
            uses[id(parent)] += 1
    gradients: dict[int, Array] = {id(start): like}
    order: list[tuple[Any, Any, Any]] = []
    ready = [start]
    while ready:
        source = ready.pop()
        seen = gradients.pop(id(source), None) if source.__class__ is Node else source.data
        order.append((source, getattr(seen, "shape", None), getattr(seen, "dtype", None)))
        for parent, part in _pull(source, seen):
            if part is not None and parent.__class__ is Node:
                gradients.setdefault(id(parent), part)
            uses[id(parent)] -= 1
            if not uses[id(parent)]:
                ready.append(parent)
    return order[::-1]


def _pull(source: Any, gradient: Array | None) -> Iterator[tuple[Any, Array | None]]:
    """Yield each input with what its adjoint makes of `gradient`: some share work, so all run."""
    for place, (parent, adjoint) in enumerate(_edges(source)):
        if gradient is None:
            yield parent, None
        elif source.name == "batch_norm":  # it may sum over ranks, which others would not do
            yield parent, gradient if place == 0 else gradient[0]
        else:
            yield parent, adjoint(gradient, None)


def names_of(model: Any, params: Any) -> dict[int, str]:
    """Return the names of leaves, by id: those of `params`, then a model's `named_parameters()`.

    Raises AutogradError for what gives no names.
    """
    names: dict[int, str] = {}
    for what, given in (("params", params), ("model", model)):
        if given is None:
            continue
        try:
            known = given.named_parameters() if what == "model" else given
            for name, leaf in dict(known).items():
                names.setdefault(id(leaf), told(name, form=str))
        except Exception as error:  # it may be anybody's
            wanted = "a model" if what == "model" else "a dict of names and tensors"
            raise AutogradError(f"draw {what}={told(given)}: expected {wanted}") from error
    return names
