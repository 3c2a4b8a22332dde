"""New ranks in the place of those that were killed: `mpidl run --elastic --replace`.

The ranks that are left go on at once (`mpidl.elastic`). Meanwhile rank 0 spawns one process for
each that is missing (MPI_Comm_spawn), which runs the script from its beginning, alone and under the
dead one's number, up to its `fit`. There it tells rank 0. At the next snapshot all make a world
together, and go on from that snapshot, so that no step is made again.

The world grows in phases, and after each the old ranks agree whether it went well for all. If it
did not, the new one ends, and the others recover as from any rank's death.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpidl import abort, config, making, spawned, supervised, watchdog, world
from mpidl.errors import MpidlError
from mpidl.newcomer import DONE, JOIN, LEAVE, Newcomer, spawn
from mpidl.spawned import TAG

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpidl.elastic import Elastic
    from mpidl.history import History
    from mpidl.world import World

ATTEMPTS = 3  # that may fail, until there are no more
SPAWN_SECONDS = 60.0  # in which MPI_Comm_spawn returns, if ever
END_SECONDS = 3.0  # that the end of a run waits for a process that is starting

_all: list[Replacements] = []


@dataclass
class Replacements:
    """Who died, and who comes in their places. One of each `Elastic`."""

    number: int  #: of this rank, in the first world
    members: tuple[tuple[int, ...], ...]  #: the first world's ranks, by node
    hosts: list[str]  #: of all of its ranks
    results: list[History] = field(default_factory=list)  #: of each `fit` that is done
    coming: dict[int, Newcomer] = field(default_factory=dict)  #: by number; on rank 0
    joining: int | None = None  #: the number of the one that joins now; the same on all
    there: set[int] = field(init=False)  #: the numbers of the ranks of the world; on rank 0
    failed: int = 0  #: attempts; on rank 0
    given_up: bool = False  #: on rank 0

    def __post_init__(self) -> None:
        self.there = set(range(self.size))

    @property
    def size(self) -> int:
        """How many ranks there should be."""
        return len(self.hosts)

    def look(self, ranks: World) -> None:
        """Spawn those that are missing. Collective, after each change of the world."""
        self.there = set(ranks.gather(self.number))
        if ranks.rank == 0:
            self._begin(ranks)
        else:
            self.close(0.0)

    def _begin(self, ranks: World) -> None:
        missing = set(range(self.size)) - self.there - set(self.coming)
        for number in () if self.given_up else sorted(missing):
            self.coming[number] = made = Newcomer(number)
            host = self.hosts[number]
            if host not in {self.hosts[other] for other in self.there}:
                host = self.hosts[self.number]  # the snapshots are where the others are
            given = ranks.MPI, self._world(number), None if len(set(self.hosts)) == 1 else host
            if not ranks.threads:
                spawn(made, *given)
                continue
            made.thread = threading.Thread(
                target=spawn, args=(made, *given), name="mpidl spawn", daemon=True
            )
            made.thread.start()

    def poll(self, ranks: World) -> int | None:
        """Return the number of one that is ready to join, or None. Collective, and quick.

        Raises MpidlError on every rank where too few are left, and none will come.
        """
        ready, problem = ranks.broadcast(self._next(ranks) if ranks.rank == 0 else (None, None))
        if problem is not None:
            ranks.agree(MpidlError(problem))
        return ready

    def _next(self, ranks: World) -> tuple[int | None, str | None]:
        ready = None
        for number, newcomer in list(self.coming.items()):
            if newcomer.starting:
                if time.monotonic() > newcomer.begun + SPAWN_SECONDS:
                    self.failed = ATTEMPTS - 1  # another one would hardly do better
                    self.fail(number, f"it has not started after {SPAWN_SECONDS:.0f} s")
                continue
            newcomer.look()
            if newcomer.asks is not None and newcomer.asks < len(self.results):
                newcomer.answer((DONE, self.results[newcomer.asks]))
            if newcomer.problem is not None:
                self.fail(number, newcomer.problem)
            elif newcomer.asks == len(self.results):
                ready = number
        self._begin(ranks)
        least = config.min_ranks()
        if self.given_up and ranks.size < least:
            return None, too_few(ranks.size, least)
        return ready, None

    def fail(self, number: int, problem: str) -> None:
        """Note that an attempt has failed; tell of the last."""
        self.coming.pop(number, None)
        self.failed += 1
        if self.failed == ATTEMPTS:
            self.given_up = True
            text = f"mpidl: no replacement for rank {number}: {problem} ({ATTEMPTS} attempts); "
            print(text + "training goes on with fewer ranks", file=sys.stderr, flush=True)

    def _world(self, number: int) -> dict[str, Any]:
        """Return what a rank of the first world knew of it."""
        node = next(n for n, ranks in enumerate(self.members) if number in ranks)
        return {
            "rank": number,
            "size": self.size,
            "local_rank": self.members[node].index(number),
            "local_size": len(self.members[node]),
            "node": node,
            "nodes": len(self.members),
            "members": self.members,
            "hosts": self.hosts,
        }

    def close(self, seconds: float = END_SECONDS) -> None:
        """Let those end that have not joined. Not collective."""
        while self.coming:
            self.coming.popitem()[1].dismiss(seconds)


def of(ranks: World) -> Replacements | None:
    """Return what a trainer begins with; None where there are no replacements. Collective."""
    if not config.replace():
        return None
    if _all:  # a replacement would come to the `fit` of the first one
        _all[0].close()
        if ranks.rank == 0 and len(_all) == 1:
            text = "mpidl: ranks that die are replaced for the first elastic Trainer only"
            print(text, file=sys.stderr, flush=True)
        return None
    told = spawned.parent.told if spawned.parent is not None else None
    if told is not None:
        made = Replacements(told["rank"], told["members"], told["hosts"])
    else:
        hosts = ranks.gather(ranks.MPI.Get_processor_name())
        made = Replacements(ranks.rank, ranks.members, hosts)
    _all.append(made)
    atexit.register(made.close)
    return made


def too_few(size: int, least: int) -> str:
    """Return the error of a run that ends since too few ranks are left."""
    s, verb = ("s", "are") if size > 1 else ("", "is")
    return f"ranks were killed: {size} rank{s} {verb} left, and --min-ranks is {least}"


def own(ranks: World) -> World:
    """Return the world that a trainer is made in: this rank alone, where it is a replacement."""
    return ranks if spawned.parent is None else ranks.alone()


def wait(results: int) -> History | None:
    """Wait for the others, who may have done what is asked for: then return what came out.

    Of a replacement, whose script has come to a `fit` after so many `results`. Does not return
    where nobody waits for it any more.
    """
    assert spawned.parent is not None
    answer, found = spawned.parent.ask(results)
    if answer == LEAVE:
        spawned.leave()
    return found if answer == DONE else None


def grown(elastic: Elastic) -> World:
    """Return the world with the rank that joins. Collective among those that are left, and it.

    It takes the place of the trainer's, as in `elastic.shrunk`. Raises RankDied on those that are
    left where it did not come about. A replacement then ends.
    """
    if spawned.parent is not None:
        try:
            with spawned.at_most(spawned.JOIN_SECONDS, spawned.parent.process):
                return _join(elastic)
        except Exception:  # whatever it is, the others do without this rank
            spawned.leave()
    ranks, mine = elastic.trainer.world, elastic.replacements
    assert mine is not None
    number, mine.joining = mine.joining, None
    assert number is not None
    newcomer = mine.coming.get(number) if ranks.rank == 0 else None
    pair = ranks.MPI.Intracomm()
    if newcomer is not None:
        pair = newcomer.pair
        newcomer.answer((JOIN, None))
    made = _Phases(ranks, pair)
    try:
        inter = made.do(lambda: ranks.comm.Create_intercomm(0, pair, 1, TAG))
        merged = made.do(lambda: inter.Merge(high=False))
        grown = made.do(lambda: _world_of(ranks.MPI, merged, mine.number))
    except MpidlError:
        if newcomer is not None:
            mine.fail(number, "the others could not be joined")
        raise
    if newcomer is not None:
        del mine.coming[number]
    _take(elastic, grown)
    _share(elastic, grown)
    return grown


class _Phases:
    """Makes communicators, one from the other, and agrees after each."""

    def __init__(self, ranks: World, pair: Any) -> None:
        self.ranks = ranks
        self.made = [pair]

    def do(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns on all ranks; or raise RankDied on all. Collective."""
        from mpidl.elastic import RankDied, agreed  # it imports this module

        made = None
        try:
            made = make()
        except Exception:  # of MPI, or what comes of garbage
            self.revoke()
        if not agreed(self.ranks, well=made is not None):
            self.revoke()
            raise RankDied("the world has not grown")
        self.made.append(getattr(made, "comm", made))
        return made

    def revoke(self) -> None:
        for comm in self.made:
            if comm != self.ranks.MPI.COMM_NULL and not comm.Is_revoked():
                comm.Revoke()


def _join(elastic: Elastic) -> World:
    parent, ranks = spawned.parent, elastic.trainer.world
    assert parent is not None
    inter = ranks.comm.Create_intercomm(0, parent.comm, 0, TAG)
    assert elastic.replacements is not None
    grown = _world_of(ranks.MPI, inter.Merge(high=True), elastic.replacements.number)
    spawned.parent, abort.counts = None, True
    _take(elastic, grown)
    _share(elastic, grown)
    return grown


def _world_of(MPI: Any, merged: Any, number: int) -> World:
    """Return the world of all, by their numbers in the first one. Collective."""
    comm = making.made(MPI, merged, lambda: merged.Split(0, number))
    grown = world.World.of(MPI, comm)
    watchdog.again(grown)
    return grown


def _take(elastic: Elastic, grown: World) -> None:
    known = grown.gather(supervised.known())
    supervised.start(next((found for found in known if found is not None), None))
    supervised.tell_size(grown.size)
    elastic.trainer.world = grown
    world.replace_current(grown)
    abort.end_without_finalizing(grown.comm)


def _share(elastic: Elastic, ranks: World) -> None:
    """Tell the new one what it has to know. Collective."""
    from mpidl.elastic import RankDied

    told = None if elastic.folder is None else elastic.shared()
    known = ranks.gather((ranks.node, elastic.folder, told))
    folders = {node: folder for node, folder, _ in known if folder is not None}
    if len(folders) < ranks.nodes:  # it came to a host where none of the others is
        raise RankDied("a new rank has no snapshots")  # where it came about, it ends
    if elastic.folder is None:
        told = next(told for *_, told in known if told is not None)
        elastic.take(folders[ranks.node], told)
