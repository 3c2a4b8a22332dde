"""Parameter groups: which optimizer has which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mpidl.optim.base import Optimizer

#: One optimizer, or name pattern -> optimizer; the first pattern that matches counts.
Groups: TypeAlias = "Optimizer | Mapping[str, Optimizer]"


def assign(
    optimizer: Groups, names: Iterable[str], spare: Collection[str] = ()
) -> tuple[list[Optimizer], dict[str, int]]:
    """Return the optimizers, and for each dotted parameter name which of them has it.

    Patterns are those of `fnmatch`, upper and lower case apart. Names in `spare` need no optimizer,
    but a pattern may be theirs alone. Raises InvalidArgument for another name that no pattern
    matches, a pattern that gets no name, and what is not an optimizer.
    """
    patterns = optimizer if isinstance(optimizer, Mapping) else {"*": optimizer}
    for pattern, made in patterns.items():
        if isinstance(made, type) or not (hasattr(made, "update") and hasattr(made, "init")):
            raise InvalidArgument(
                f"optimizer for {pattern!r}: expected one such as SGD(lr=0.1), found {made!r}"
            )
    group_of: dict[str, int] = {}
    for name in (*names, *spare):
        found = (i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern))
        group = next(found, None)
        if group is not None:
            group_of[name] = group
        elif name not in spare:
            raise InvalidArgument(
                f"no optimizer for parameter {name}: its name matches none of "
                f'{", ".join(map(repr, patterns))}; end with "*" for all others'
            )
    for i, pattern in enumerate(patterns):
        if i not in group_of.values():
            raise InvalidArgument(
                f"optimizer pattern {pattern!r} gets no parameter (the first match counts), of "
                + ", ".join(list(group_of)[:8])
                + (", ..." if len(group_of) > 8 else "")
            )
    return list(patterns.values()), group_of
