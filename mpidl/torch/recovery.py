"""How the ranks that are left go on when others have died; for `elastic.run`.

Needs MPI's fault tolerance, which `mpidl run --elastic` asks for: see `mpidl.elastic`, whose rules
hold here. What is to last, a commit and the end of training, stands behind an agreement.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpidl import config, elastic, replacement
from mpidl import world as worlds
from mpidl.errors import InvalidArgument, MpidlError
from mpidl.strategies import LIBRARIES
from mpidl.torch import session as sessions

if TYPE_CHECKING:
    from mpidl.torch.elastic import State


def is_replica(value: Any) -> bool:
    """Tell whether this is an `mpidl.torch.DataParallel`, without importing it."""
    parallel = sys.modules.get("mpidl.torch.parallel")
    return parallel is not None and isinstance(value, parallel.DataParallel)


def check(state: State) -> None:
    """Raise InvalidArgument on every rank for what cannot be built anew. Collective."""
    if not config.fault_tolerant():
        return
    with sessions.active().world.together():
        kept = state.optimizers()
        if config.replace():
            raise InvalidArgument("elastic.run takes in no new ranks: start it without --replace")
        for replica in state.replicas():
            if not isinstance(replica._asked.strategy, str) or replica.choice.name in LIBRARIES:
                raise InvalidArgument(
                    f"elastic.run with strategy {replica.choice.name!r}, which does not survive a "
                    "rank's death: expected the name of another one"
                )
            if replica.optimizer is not None and replica.optimizer not in kept:
                raise InvalidArgument(
                    "elastic.run with a DataParallel whose optimizer is not in the state: expected "
                    "TorchState(model, optimizer)"
                )


def agree() -> None:
    """Raise RankDied on all ranks that are left where any has died. Collective."""
    if config.fault_tolerant() and not elastic.agreed(sessions.active().world, well=True):
        raise elastic.RankDied("another rank has died")


def died(error: BaseException) -> bool:
    """Tell whether an error may come of a rank's death; then all others learn of it."""
    if not config.fault_tolerant() or not sessions.active().of_all:
        return False
    ranks = worlds.current()  # newer than the session's, where a recovery has failed
    if not elastic.died(ranks, error):
        return False
    elastic.agreed(ranks, well=False)
    return True


def recover(state: State) -> int:
    """Go back to the last commit with the ranks that are left. Collective among them.

    Returns how many are not. Raises where another one dies meanwhile: then this is to be called
    again.
    """
    before = worlds.current()
    worlds.revoke(before)
    sessions.active().engine.abandon(MpidlError("ranks have died"))
    for replica in state.replicas():
        replica.leave()
    left = elastic.shrunk(before)
    if left.size < config.min_ranks():
        left.agree(MpidlError(replacement.too_few(left.size, config.min_ranks())))
    sessions.rebuild(left)
    state.restore()
    for replica in state.replicas():
        replica.enter(left)
    return before.size - left.size
