"""Rank 0's part: what has been submitted by all its ranks may begin, in one order for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from mpidl.collectives.checks import Found, compare
from mpidl.collectives.ids import IDS, Ids
from mpidl.errors import InvalidArgument, RankMismatch
from mpidl.marks import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mpidl.collectives.request import Item, Key

ADD, REMOVE = "add_process_set", "remove_process_set"  # kinds of its own


@dataclass
class Extras:
    """What an answer tells besides ids."""

    definitions: list[tuple[int, Item]] = field(default_factory=list)  #: of ids, new or anew
    #: What each rank has submitted that ends so.
    errors: list[tuple[dict[int, list[Key]], Found]] = field(default_factory=list)
    joined: int | None = None  #: the last rank to join, once all have
    closed: bool = False
    retired: list[int] = field(default_factory=list)  #: ids to forget, and then to say so


@dataclass
class Answer:
    """What a rank is to execute, in this order, and to know before it does."""

    ids: npt.NDArray[np.int32]
    extras: Extras | None = None


@dataclass
class _Pending:
    """What was submitted under some names, where ids do not tell."""

    process_set: int
    items: dict[int, list[Item]] = field(default_factory=dict)  #: by rank
    keys: set[Key] = field(default_factory=set)
    ended: bool = False


@final
class Coordinator:
    """Counts who has submitted what. It knows nothing of MPI, and never waits.

    An operation that was agreed on gets an id, if its name was used before: see `Ids`. From then
    on ranks submit it by that id, and a batch of ids is counted at once, as an array. What is
    submitted without an id, or not as before, or by an id that is retired, is compared first: a
    `_Pending`. A name has one id that counts, its owner.
    """

    def __init__(self, size: int) -> None:
        self.sets: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        self.joined: list[int] = []  #: ranks, in their order
        self._size = size
        self._closed, self._removed = set[int](), set[int]()  # ranks, process sets
        self._items: list[dict[int, Item]] = [{}] * IDS  # by id: what each rank submitted
        self._owner: dict[Key, int] = {}
        self._ids = Ids(size)
        self._counts, self._needed, self._set_of = (np.zeros(IDS, np.int32) for _ in range(3))
        self._seen = np.zeros((IDS, size), bool)  # by id and rank
        self._slow = np.zeros(IDS, bool)  # ids that do not count alone: see `_pending`
        self._pending: dict[Key, _Pending] = {}
        self._touched: dict[int, _Pending] = {}  # by id(), since the last round
        self._ready: list[npt.NDArray[np.int32]] = []
        self._next_set = 1
        self._extras = Extras()

    @property
    def listens(self) -> bool:
        """Whether others may go on without anything that rank 0 submits."""
        apart = any(ranks[0] for i, ranks in self.sets.items() if i not in self._removed)
        return apart or bool(self.joined)

    def submit(self, rank: int, ids: npt.NDArray[np.int32], items: Sequence[Item]) -> None:
        """Take a batch of `rank`."""
        if ids.size:
            slow = self._slow[ids]
            if self.joined or slow.any():
                if self.joined:
                    slow[:] = True
                for i in ids[slow].tolist():
                    self._take(rank, self._items[i][rank])
                ids = ids[~slow]
            self._counts[ids] += 1
            self._seen[ids, rank] = True
            done = ids[self._counts[ids] == self._needed[ids]]
            if done.size:
                self._counts[done] = 0
                self._seen[done] = False
                if self._ids.scarce:
                    self._ids.use(done)
                self._ready.append(done)
        for item in items:
            self._take(rank, item)

    def join(self, rank: int) -> None:
        """Count `rank` as having submitted everything, until all have joined."""
        self.joined.append(rank)
        for i in np.flatnonzero(self._counts).tolist():
            self._slow_down(i)
        self._touched.update((id(pending), pending) for pending in self._pending.values())

    def close(self, rank: int) -> None:
        """Note that `rank` submits nothing more."""
        self._closed.add(rank)

    def forget(self, rank: int) -> None:
        """Note that `rank` has forgotten the ids that were retired."""
        for i in self._ids.forget(rank):
            self._items[i] = {}

    def waiting(self) -> Iterator[tuple[tuple[Key, ...], str, list[int], list[int]]]:
        """Yield the names and kind of all that has begun, who has submitted it, and who not."""
        for i in np.flatnonzero(self._counts).tolist():
            item = next(iter(self._items[i].values()))
            here = np.flatnonzero(self._seen[i]).tolist()
            missing = [r for r in self.sets[item.process_set] if r not in here]
            yield item.keys, item.descriptions[0].kind, here, missing
        for pending in {id(p): p for p in self._pending.values()}.values():
            item = next(iter(pending.items.values()))[0]
            here = sorted(pending.items)
            missing = [r for r in self.sets[item.process_set] if r not in {*here, *self.joined}]
            yield item.keys, item.descriptions[0].kind, here, missing

    def answers(self) -> dict[int, Answer]:
        """Return what each rank may begin now, if anything; ordered by process set.

        The operations of a set are neighbours in it, in one order, on all its ranks.
        """
        for pending in list(self._touched.values()):
            members = self.sets[pending.process_set]
            if pending.ended:
                continue
            if all(rank in pending.items or rank in self.joined for rank in members):
                self._agree(pending, members)
        self._touched.clear()
        if len(self.joined) == self._size:
            self._extras.joined = self.joined[-1]
            self.joined.clear()
        if self._closed:
            self._give_up("the engine was closed there before", self._closed)
        if len(self._closed) == self._size and not self._ids.unaware:
            self._extras.closed = True
            self._closed.clear()
        if self._ids.wanted:
            self._retire()
        self._ids.round += 1
        if not self._ready and self._extras == Extras():
            return {}
        ids = np.concatenate([np.empty(0, np.int32), *self._ready])
        extras, self._ready, self._extras = self._extras, [], Extras()
        return self._address(ids, extras)

    def _address(self, ids: npt.NDArray[np.int32], extras: Extras) -> dict[int, Answer]:
        """Return for each rank what is for it."""
        fresh = {i: item.process_set for i, item in extras.definitions}
        sets = self._set_of[np.minimum(ids, IDS - 1)]
        if fresh:
            sets = np.array([fresh.get(i, s) for i, s in zip(ids.tolist(), sets, strict=True)])
        everything = extras if extras != Extras() else None
        if not sets.any():
            return dict.fromkeys(range(self._size), Answer(ids, everything))
        order = np.argsort(sets, kind="stable")
        ids, sets = ids[order], sets[order]
        found = {}
        for rank in range(self._size):
            mine = {s for s, ranks in self.sets.items() if rank in ranks}
            part = Answer(ids[np.isin(sets, list(mine))])
            if everything is not None:
                part.extras = Extras(
                    [(i, item) for i, item in extras.definitions if item.process_set in mine],
                    [(keys, error) for keys, error in extras.errors if rank in keys],
                    extras.joined,
                    extras.closed,
                    extras.retired,
                )
            if part.ids.size or part.extras not in (None, Extras()):
                found[rank] = part
        return found

    def _take(self, rank: int, item: Item) -> None:
        """Add an item to what is pending under any of its names."""
        keys = item.keys
        if (
            item.group is not None
        ):  # so that groups of one number are compared, whatever their names
            keys += ((item.process_set, f"\0{item.group}"),)
        for i in {self._owner[key] for key in keys if key in self._owner}:
            if self._counts[i]:
                self._slow_down(i)
            self._slow[i] = True
        found = {id(p): p for p in map(self._pending.get, keys) if p is not None}
        pending, *others = found.values() or [_Pending(item.process_set)]
        for other in others:
            for r, items in other.items.items():
                pending.items.setdefault(r, []).extend(items)
            pending.keys |= other.keys
            self._touched.pop(id(other), None)
        pending.items.setdefault(rank, []).append(item)
        pending.keys.update(keys)
        for key in pending.keys if others else keys:
            self._pending[key] = pending
        self._touched[id(pending)] = pending

    def _slow_down(self, i: int) -> None:
        """Compare the next operation with this id, as if all had told what it stands for."""
        ranks = np.flatnonzero(self._seen[i]).tolist()
        self._counts[i], self._seen[i] = 0, False
        for rank in ranks:
            self._take(rank, self._items[i][rank])

    def _agree(self, pending: _Pending, members: tuple[int, ...]) -> None:
        """End what is pending: with an id, or with an error."""
        joined = [rank for rank in self.joined if rank in members]
        error = compare(pending.items, members, joined)
        items = {rank: found[0]._replace(group=None) for rank, found in pending.items.items()}
        one = next(iter(items.values()))
        if error is None and one.descriptions[0].kind in (ADD, REMOVE):
            error = self._change_sets(one)
        if error is not None:
            self._fail(pending, error)
            return
        self._end(pending)
        names = one.keys
        i = self._ids.without(names) if joined else self._ids.of(names)
        if i >= IDS:
            i = IDS + len(self._extras.definitions)  # for this once
        else:
            self._items[i] = items
            before = {self._owner[key] for key in names if key in self._owner} - {i}
            self._owner.update(dict.fromkeys(names, i))
            self._needed[i], self._set_of[i] = len(members), one.process_set
            self._slow[i] = False
            self._slow[list(before)] = True
        self._extras.definitions.append((i, one))
        self._ready.append(np.array([i], np.int32))

    def _retire(self) -> None:
        """Let ids of names that come no more count no more, and all ranks forget them."""
        retired = self._ids.retire(self._counts == 0)
        for i in retired:
            for key in next(iter(self._items[i].values())).keys:
                if self._owner.get(key) == i:
                    del self._owner[key]
        self._slow[retired] = True
        self._extras.retired = retired

    def _fail(self, pending: _Pending, error: Found) -> None:
        """End what is pending with an error, on all ranks that have submitted it."""
        keys = {r: [key for i in items for key in i.keys] for r, items in pending.items.items()}
        self._extras.errors.append((keys, error))
        self._end(pending)

    def _end(self, pending: _Pending) -> None:
        """Forget what is pending; ids count again that own all of their names."""
        pending.ended = True
        for key in pending.keys:
            del self._pending[key]
        for i in {self._owner[key] for key in pending.keys if key in self._owner}:
            names = next(iter(self._items[i].values())).keys
            self._slow[i] = any(self._owner[k] != i or k in self._pending for k in names)

    def _change_sets(self, item: Item) -> Found | None:
        """Add or remove a process set, here; the ranks do so when they come to the id."""
        change = item.descriptions[0]
        if change.kind == ADD:
            assert change.splits is not None
            self.sets[self._next_set] = change.splits
            self._next_set += 1
            return None
        removed = change.root
        if removed not in self.sets or removed == 0 or removed in self._removed:
            return InvalidArgument, f"process set {removed}: expected one that was added"
        everyone = set(self.sets[removed])
        self._give_up(f"process set {removed} was removed before", everyone, removed)
        self._removed.add(removed)
        return None

    def _give_up(self, why: str, ranks: set[int], process_set: int | None = None) -> None:
        """End with an error what is pending and waits for `ranks`, in one process set or all."""
        for i in np.flatnonzero(self._counts).tolist():
            self._slow_down(i)
        for pending in {id(p): p for p in self._pending.values()}.values():
            members = self.sets[pending.process_set]
            missing = ranks.intersection(members) - {*pending.items, *self.joined}
            if missing and process_set in (None, pending.process_set):
                first = next(iter(pending.items.values()))[0]
                text = f"{first.names[0]!r}: {why} {some(missing)} submitted it"
                self._fail(pending, (RankMismatch, text))
