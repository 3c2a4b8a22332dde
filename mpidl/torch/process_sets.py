"""Subsets of the ranks that run collectives of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument, RankMismatch
from mpidl.refuse import is_whole, told
from mpidl.torch import session as sessions
from mpidl.torch.arguments import WRONG, ours, wholes
from mpidl.torch.errors import internal, on_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mpidl.torch.session import Session


class ProcessSet:
    """Some of the ranks: give it to `init` or `add_process_set`, then to the operations.

    `ranks_or_comm` are ranks of the world, or an mpi4py communicator of those. The latter may be
    another one on other ranks, as MPI_Comm_split makes them. `process_set_id` is None, until the
    set has been added, and after it was removed. Raises InvalidArgument for others.
    """

    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None:
        self.process_set_id: int | None = None
        self.mpi_comm: Any = ranks_or_comm if hasattr(ranks_or_comm, "Get_rank") else None
        self.ranks: list[int] | None = None
        self._rank: int | None = None  # of this process in the set
        if self.mpi_comm is None:
            self.ranks = sorted({*wholes("ProcessSet", ranks_or_comm)})

    def included(self) -> bool | None:
        """Return whether this process is in the set; None before it has been added."""
        return None if self.process_set_id is None else self._rank is not None

    def rank(self) -> int | None:
        """Return this process's rank in the set; None outside of it, or before it was added."""
        return None if self.process_set_id is None else self._rank

    def size(self) -> int | None:
        """Return the number of ranks in the set; None before it has been added."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def place(self, rank: int) -> int:
        """Return where in the set a rank of the world is. Raises InvalidArgument if nowhere."""
        if not is_whole(rank) or self.ranks is None or rank not in self.ranks:
            raise InvalidArgument(f"root_rank={told(rank)}: expected one of the ranks of {self}")
        return self.ranks.index(rank)

    def _enter(self, number: int, ranks: Iterable[int], rank: int) -> None:
        self.process_set_id, self.ranks = number, list(ranks)
        self._rank = self.ranks.index(rank) if rank in self.ranks else None

    def _leave(self) -> None:
        self.process_set_id = self._rank = None

    def __repr__(self) -> str:
        return (
            f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, "
            f"mpi_comm={self.mpi_comm})"
        )


global_process_set = ProcessSet([])

_added: list[ProcessSet] = []
_known: dict[int, tuple[int, ...]] = {}  # all sets but that of all ranks, also without this one


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Add a set, and return it. Collective over all ranks, in the set or not.

    Raises InvalidArgument on every rank for a set that was added already, or one of other ranks
    than there are; RankMismatch where the ranks add different ones.
    """
    session = sessions.active()
    world, problem = session.world, None
    mine: tuple[tuple[int, ...], bool] = ((), True)
    with internal():
        try:
            made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
            if made.process_set_id is not None:
                raise InvalidArgument(f"{made} has been added already")
            mine = (_ranks_of(made, world), made.mpi_comm is None)
        except WRONG as error:
            problem = ours(error)
        found = session.gather_well(mine, problem, "add_process_set")
        given = [ranks for ranks, _ in found]
        wanted = list(dict.fromkeys(given))
        if len(wanted) > 1 and any(alike for _, alike in found):
            rest = given.index(wanted[1])
            text = f"add_process_set: rank 0: ranks {given[0]}; rank {rest}: ranks {given[rest]}"
            raise on_all(RankMismatch(text))
        for ranks in wanted:
            if ranks in (tuple(range(world.size)), *_known.values()):
                raise InvalidArgument(f"add_process_set: there is one of ranks {ranks} already")
            if not {*ranks} <= {*range(world.size)} or not ranks:
                raise InvalidArgument(
                    f"add_process_set: ranks {ranks}: expected ranks from 0 to {world.size - 1}"
                )
        for ranks in wanted:
            number = session.engine.add_process_set(ranks)
            _known[number] = ranks
            if ranks == given[world.rank]:
                made._enter(number, ranks, world.rank)
    _added.append(made)
    return made


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a set, and return whether there was one to remove. Collective over all ranks.

    That of all ranks stays. `process_set` can be added again. Raises on every rank InvalidArgument
    for what is no process set; RankMismatch where the ranks remove different ones, but for those
    that were made of communicators.
    """
    session = sessions.active()
    mine: tuple[int | None, bool] = (None, True)
    problem = None
    if not isinstance(process_set, ProcessSet):
        problem = InvalidArgument(f"remove_process_set: {told(process_set)}: expected a ProcessSet")
    elif process_set is not global_process_set:
        mine = (process_set.process_set_id, process_set.mpi_comm is None)
    with internal():
        found = session.gather_well(mine, problem, "remove_process_set")
        numbers = list(dict.fromkeys(number for number, _ in found))
        if len(numbers) > 1 and any(alike for _, alike in found):
            rest = next(i for i, (number, _) in enumerate(found) if number != numbers[0])
            text = f"rank 0: that of id {numbers[0]}; rank {rest}: that of id {found[rest][0]}"
            raise on_all(RankMismatch(f"remove_process_set: {text}"))
        for each in numbers:
            if each is not None:
                session.engine.remove_process_set(each)
                del _known[each]
    if mine[0] is None:
        return False
    process_set._leave()
    _added.remove(process_set)
    return True


def set_up(session: Session, comm: Any) -> None:
    """Give `global_process_set` its ranks."""
    global_process_set._enter(0, range(session.world.size), session.world.rank)
    global_process_set.mpi_comm = comm


def tear_down() -> None:
    """Forget all sets, which end with the session."""
    for process_set in (global_process_set, *_added):
        process_set._leave()
    _added.clear()
    _known.clear()


def move(session: Session, before: Session) -> None:
    """Add all sets to another session, without those ranks of `before` that it has not. Collective.

    A set of which no rank is left is one that was removed.
    """
    known, added = dict(_known), [(each, tuple(each.ranks or ())) for each in _added]
    comm = global_process_set.mpi_comm
    theirs, ours = before.group, session.group
    made: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for ranks in known.values():
        here = tuple(r for r in theirs.Translate_ranks(list(ranks), ours) if r >= 0)
        if here:
            made.append((session.engine.add_process_set(here), here, ranks))
    tear_down()
    set_up(session, comm)
    for number, here, ranks in made:
        _known[number] = here
        for process_set, old in added:
            if old == ranks:
                process_set._enter(number, here, session.world.rank)
                _added.append(process_set)


def _ranks_of(process_set: ProcessSet, world: Any) -> tuple[int, ...]:
    """Return the ranks of the world that a set has, or its communicator."""
    if process_set.mpi_comm is None:
        return tuple(process_set.ranks or ())
    group = process_set.mpi_comm.Get_group()
    whole = world.comm.Get_group()
    return tuple(sorted(group.Translate_ranks(list(range(group.size)), whole)))
