"""Whether what the ranks submitted under one name fits together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.collectives.request import COMPARED, UNEQUAL
from mpidl.errors import InvalidArgument, MpidlError, RankMismatch
from mpidl.marks import by_rank, some

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpidl.collectives.request import Description, Item

#: What needs all ranks, also those that have joined.
ALL_TAKE_PART = ("alltoall", "add_process_set", "remove_process_set")
#: What the zeros of a rank that has joined would spoil.
NOT_OF_ZEROS = ("min", "max", "product")

Found = tuple[type[MpidlError], str]


def compare(
    items: Mapping[int, Sequence[Item]], members: Sequence[int], joined: Collection[int]
) -> Found | None:
    """Return the error for all ranks, or None; `items` are what each rank submitted.

    `members` are the ranks of the process set, of which those in `joined` submit nothing.
    """
    ranks = sorted(items)
    given = {rank: [item.names for item in items[rank]] for rank in ranks}
    first = given[ranks[0]]
    if len(first) > 1 or any(names != first for names in given.values()):
        told = {r: d.problem for r in ranks for i in items[r] for d in i.descriptions if d.problem}
        if told:  # a rank that cannot begin with a group tells of one name only
            return RankMismatch, by_rank(told)
        told = {r: " and ".join(_listed(names) for names in given[r]) for r in ranks}
        return RankMismatch, f"groups of other members: {by_rank(told)}"
    for i, name in enumerate(first[0]):
        found = _differ({rank: items[rank][0].descriptions[i] for rank in ranks}, members, joined)
        if found is not None:
            kind, text = found
            return kind, f"{name!r}: {text}"
    return None


def _differ(
    found: Mapping[int, Description], members: Sequence[int], joined: Collection[int]
) -> Found | None:
    problems = {rank: d.problem for rank, d in found.items() if d.problem}
    if problems:
        kind = InvalidArgument if len(problems) == len(found) else RankMismatch
        return kind, by_rank(problems)
    one = next(iter(found.values()))
    for field in ("kind", "dtype", "device", *COMPARED.get(one.kind, ("splits", "root"))):
        told: dict[int, Any] = {rank: getattr(d, field) for rank, d in found.items()}
        if field == "shape" and one.kind in UNEQUAL:
            told = {rank: ("any", *shape[1:]) for rank, shape in told.items()}
        if len(set(told.values())) > 1:
            return RankMismatch, f"{one.kind}: {field}: {by_rank(told)}"
    if one.kind == "broadcast" and members[one.root] in joined:
        return RankMismatch, f"broadcast: rank {members[one.root]}, its root, has joined"
    if joined and (one.kind in ALL_TAKE_PART or one.op in NOT_OF_ZEROS):
        what = f"{one.kind} by {one.op}" if one.op in NOT_OF_ZEROS else one.kind
        return (
            RankMismatch,
            f"{what}: {some(joined)} {'has' if len(joined) == 1 else 'have'} joined",
        )
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
