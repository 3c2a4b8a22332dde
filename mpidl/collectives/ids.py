"""Which names have an id, and which give theirs back."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mpidl.collectives.request import Key

    Names = tuple[Key, ...]

IDS = 1 << 14  # of names in use; beyond, names stay without one
RETIRED = 16  # a part of so many at a time
REMEMBERED = 4  # times as many names without one


@final
class Ids:
    """Gives an id to names that are used a second time: what never comes again is to have none.

    Where all ids are taken, those of names that come no more are retired: that were used last
    before the names that want one were used the time before (two last uses are compared as in
    LRU-2, O'Neil, O'Neil and Weikum 1993). So more names than ids, if they come in turns, do not
    take them from each other. A rank that does not know it yet may still submit a retired id; it
    is given anew when all ranks have said that they forgot it.
    """

    def __init__(self, ranks: int) -> None:
        self.unaware = set[int]()  #: ranks that have not forgotten the retired ones yet
        self.round = 1  #: the time, as uses are compared
        self.scarce = False  #: whether to tell of uses: ids may have to be retired before long
        self.wanted = 0  #: the last use, but for this one, of names for which there was no id
        self._ranks = ranks
        self._of: dict[Names, int] = {}
        self._without: dict[Names, int] = {}  # their last use; the oldest are dropped
        self._used = np.zeros(IDS, np.int64)  # last uses by id
        self._given = 0
        self._retired: list[int] = []
        self._free: list[int] = []

    def of(self, names: Names) -> int:
        """Return the id of `names`, which are being used, a new one if need be; IDS for none."""
        i = self._of.get(names)
        if i is None:
            before = self._without.pop(names, 0)
            i = self._new(before) if before else IDS
            if i == IDS:
                return self.without(names)
            self._of[names] = i
        self._used[i] = self.round
        return i

    def without(self, names: Names) -> int:
        """Note that `names` are used without an id: IDS."""
        self._without[names] = self.round
        if len(self._without) > REMEMBERED * IDS:
            del self._without[next(iter(self._without))]
        return IDS

    def use(self, ids: npt.NDArray[np.int32]) -> None:
        """Note that `ids` are used."""
        self._used[ids] = self.round

    def _new(self, before: int) -> int:
        if self._free:
            return self._free.pop()
        if self._given < IDS:
            self._given += 1
            self.scarce = self._given > IDS * 3 // 4
            return self._given - 1
        self.wanted = max(self.wanted, before)
        return IDS

    def retire(self, resting: npt.NDArray[np.bool_]) -> list[int]:
        """Return the ids that are retired now, of those that are `resting` (IDS,)."""
        wanted, self.wanted = self.wanted, 0
        if self.unaware:
            return []
        idle = np.flatnonzero((self._used < wanted) & resting)
        oldest = idle[np.argsort(self._used[idle], kind="stable")]
        self._retired = oldest[: max(1, IDS // RETIRED)].tolist()
        if self._retired:
            gone = set(self._retired)
            self._of = {names: i for names, i in self._of.items() if i not in gone}
            self.unaware = set(range(self._ranks))
        return self._retired

    def forget(self, rank: int) -> list[int]:
        """Note that no retired id will come from `rank`; return those that now come from none."""
        self.unaware.discard(rank)
        if self.unaware:
            return []
        free, self._retired = self._retired, []
        self._free += free
        return free
