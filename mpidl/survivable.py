"""What a training must be like to survive the death of its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl import config
from mpidl.errors import InvalidArgument
from mpidl.strategies import LIBRARIES
from mpidl.warm import MEMORY

if TYPE_CHECKING:
    from mpidl.trainer import Trainer


def check(trainer: Trainer) -> None:
    """Raise InvalidArgument for what dies with a rank."""
    replica = trainer.replica
    options = trainer.options
    problem = ""
    if trainer.world.size > 1 and not config.fault_tolerant() and config.run_id() is None:
        problem = (
            "an MPI without fault tolerance: start with mpidl run --elastic (Open MPI 5), or with "
            "mpidl run --restarts"
        )
    elif not isinstance(options["strategy"], str):
        problem = "a strategy that was made for all ranks: expected a name"
    elif replica.choice.codec is not None or options["local_steps"] > 1:
        problem = "a codec or local_steps, whose state is each rank's own"
    elif replica.choice.name in LIBRARIES:
        problem = f"strategy {replica.choice.name!r}, which does not survive a rank's death"
    elif not MEMORY.is_dir():
        problem = f"a node without {MEMORY}"
    if problem:
        raise InvalidArgument(f"elastic=True with {problem}")


def check_owned(trainer: Trainer) -> None:
    """Raise InvalidArgument unless the ranks of each node own all of every bucket. Collective."""
    replica, ranks = trainer.replica, trainer.world
    parts = ranks.gather([(ranks.node, *_ends(replica, flat)) for flat in replica.buckets])
    for flat in zip(*parts, strict=True):
        for node in range(trainer.world.nodes):
            end = 0
            for number, start, stop, _ in sorted(flat, key=lambda part: part[1:3]):
                if number == node and start <= end:
                    end = max(end, stop)
            if end < flat[0][3]:
                problem = InvalidArgument(
                    f"elastic=True with strategy {replica.choice.name!r} on {ranks.nodes} nodes: "
                    'the state of what a node\'s ranks own would die with them: use "hierarchical"'
                )
                ranks.agree(problem)  # all have the same numbers


def _ends(replica: Any, flat: Any) -> tuple[int, int, int]:
    owned = replica.strategy.owned(flat.param.size)
    return owned.start, owned.stop, flat.param.size
