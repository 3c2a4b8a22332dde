"""One rank passes something odd to mpidl.torch: all raise an error of mpidl, and none waits.

A rank that waits is told of by the watchdog, and ends the job. As tests/ranks/test_disagreement.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ALL
from tests.ranks import test_disagreement as engine

if TYPE_CHECKING:
    import numpy as np

    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
hvd.init()

from tests.fuzz.tensors import HOSTILE, of_two_params, sparse  # noqa: E402

#: what torch says of some kinds of tensors
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(hvd.size() == 1, reason="one rank always agrees with itself"),
]
DRAWS = 40 if ALL else 2
VALUES = engine.VALUES | HOSTILE
LINEAR = torch.nn.Linear
FACTORS = {"prescale_factor": 1.0, "postscale_factor": 1.0}


def replica(**options: Any) -> Any:
    torch.manual_seed(0)
    model = LINEAR(3, 2)
    return hvd.DataParallel(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def on_replica(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        made = replica(**options)
        try:
            return call(made, **arguments)
        finally:
            made.close()

    return run


def waited(begin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **options: hvd.synchronize(begin(**options))


def a_set(process_set: Any) -> None:
    hvd.remove_process_set(hvd.add_process_set(process_set))


def removed(process_set: Any) -> None:
    made = hvd.add_process_set([0])
    try:
        assert hvd.remove_process_set(made if process_set is None else process_set)
    finally:
        assert hvd.remove_process_set(made) in (True, False)


def normalized(x: Any) -> Any:
    return hvd.SyncBatchNorm(3)(x)


#: Collective functions, and valid arguments of them. Names and process sets are not among these:
#: who gives another one is waited for.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "add_process_set": (a_set, lambda: {"process_set": [0]}),
    "allgather": (hvd.allgather, lambda: {"tensor": torch.ones(2, 3)}),
    "allgather_object": (hvd.allgather_object, lambda: {"obj": 1}),
    "allreduce": (
        hvd.allreduce,
        lambda: {"tensor": torch.ones(3), "op": hvd.Sum, "compression": hvd.Compression.none,
                 **FACTORS},
    ),
    "allreduce_": (hvd.allreduce_, lambda: {"tensor": torch.ones(3), "average": False, **FACTORS}),
    "alltoall": (
        hvd.alltoall,
        lambda: {"tensor": torch.ones(2 * hvd.size()), "splits": [2] * hvd.size()},
    ),
    "average_gradients": (
        on_replica(lambda made, samples: made.average_gradients(samples)),
        lambda: {"samples": 1.0},
    ),
    "broadcast": (hvd.broadcast, lambda: {"tensor": torch.ones(3), "root_rank": 0}),
    "broadcast_object": (hvd.broadcast_object, lambda: {"obj": 1, "root_rank": 0}),
    "broadcast_optimizer_state": (
        hvd.broadcast_optimizer_state,
        lambda: {"optimizer": of_two_params(), "root_rank": 0},
    ),
    "broadcast_parameters": (
        hvd.broadcast_parameters,
        lambda: {"params": {"a": torch.ones(2)}, "root_rank": 0},
    ),
    "DataParallel": (
        lambda **options: hvd.DataParallel(**options).close(),
        lambda: {"module": LINEAR(3, 2), "strategy": "allreduce", "codec": None,
                 "by_element": None, "batch_dim": 0, "broadcast_buffers": True, "overlap": False,
                 "bucket_bytes": 1 << 20, "microbatches": None},
    ),
    "grouped_allgather": (hvd.grouped_allgather, lambda: {"tensors": [torch.ones(2)]}),
    "grouped_allreduce": (
        hvd.grouped_allreduce,
        lambda: {"tensors": [torch.ones(2), torch.ones(3)], "op": hvd.Sum, **FACTORS},
    ),
    "load_state_dict": (
        on_replica(lambda made, state: made.load_state_dict(state)),
        lambda: {"state": dict(LINEAR(3, 2).state_dict())},
    ),
    "reducescatter": (
        hvd.reducescatter, lambda: {"tensor": torch.ones(3), "op": hvd.Sum, **FACTORS}
    ),
    "remove_process_set": (removed, lambda: {"process_set": None}),
    "Sampler": (
        lambda **options: list(hvd.Sampler(**options)),
        lambda: {"dataset": range(12), "batch_size": 4, "shuffle": True, "seed": 1,
                 "microbatches": 4},
    ),
    "sparse": (
        waited(hvd.sparse_allreduce_async),
        lambda: {"tensor": sparse(2, 3), "name": "sparse", "op": hvd.Sum},
    ),
    "split": (
        on_replica(lambda made, x: list(made.split(x)), microbatches=4),
        lambda: {"x": torch.ones(12 // hvd.size(), 3)},
    ),
    "SyncBatchNorm": (normalized, lambda: {"x": torch.ones(4, 3)}),
}  # fmt: skip
NAMES = {"sparse": ("name",)}


@pytest.mark.parametrize("name", CALLS)
def test_all_ranks_raise_or_none(name: str, world: mpidl.World, rng: np.random.Generator) -> None:
    if name == "split" and 4 % world.size:
        pytest.skip("`split` takes equal parts")
    call, valid = CALLS[name]
    assert engine.outcome(call, valid()) == ("", "", True)
    for slot in valid():
        for _ in range(0 if slot in NAMES.get(name, ()) else DRAWS):
            label = str(rng.choice(list(VALUES)))
            odd = int(rng.integers(world.size))
            options = valid()
            if world.rank == odd:
                options[slot] = VALUES[label]()
            case = f"{name}({slot}={label}) on rank {odd} of {world.size}"
            told = world.gather(engine.outcome(call, options))
            assert all(ours for _, _, ours in told), (case, told)
            assert len({not kind for kind, _, _ in told}) == 1, (case, told)
            # nobody is a call ahead, nor are names that are counted
            assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [world.size] * 2, case
