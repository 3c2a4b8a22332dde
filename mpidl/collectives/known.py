"""What a rank may submit by ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from mpidl.collectives.ids import IDS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mpidl.collectives.request import Handle, Item, Key

FORGOT = "forgot"  # how a rank tells rank 0 that it has


@final
class Known:
    """The ids that rank 0 has given, and what they stand for.

    The driver alone changes `ids`, while other threads look there: see `retire`.
    """

    def __init__(self, in_flight: dict[Key, Handle]) -> None:
        #: Id and signature, by key; of a group by its keys.
        self.ids: dict[Any, tuple[int, Any]] = {}
        self.offered: dict[tuple[Key, ...], Any] = {}  #: signatures of what was told in full
        self._in_flight = in_flight
        self.retired: list[tuple[Key, Handle]] | None = None  #: in flight then

    def learn(self, i: int, item: Item) -> None:
        """Submit `item` by its id from now on, if it has one."""
        offered = self.offered.pop(item.keys, None)
        if i < IDS and offered is not None:
            self.ids[item.keys if len(item.keys) > 1 else item.keys[0]] = (i, offered)

    def refuse(self, keys: Collection[Key]) -> None:
        """Take none of what has one of these keys for known, as it was refused."""
        for other in [other for other in self.offered if not set(keys).isdisjoint(other)]:
            del self.offered[other]

    def remove(self, process_set: int) -> None:
        """Forget what is of a process set."""
        for key in list(self.ids):
            if process_set == (key[0] if isinstance(key[1], str) else key[0][0]):
                del self.ids[key]

    def retire(self, ids: Collection[int], keys: Iterable[Key]) -> None:
        """Submit nothing more by `ids`, which stood for what has `keys`.

        A thread in `Engine.submit` may have looked an id up already. It has put its handle in
        flight before: so what is in flight after the id is gone may have been submitted by it,
        and nothing else.
        """
        for key in [key for key, (i, _) in self.ids.items() if i in ids]:
            del self.ids[key]
        flying = [(key, self._in_flight.get(key)) for key in keys]
        self.retired = [(key, handle) for key, handle in flying if handle is not None]

    def forgot(self) -> bool:
        """Return whether nothing is in flight any more that may have a retired id; True once."""
        if any(self._in_flight.get(key) is handle for key, handle in self.retired or ()):
            return False
        self.retired = None
        return True
