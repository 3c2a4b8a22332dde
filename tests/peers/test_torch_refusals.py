"""What fuzzing of mpidl.torch has found: each of these was accepted, or ended by another error."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl.errors import InvalidArgument, MpidlError, RankMismatch

if TYPE_CHECKING:
    import mpidl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
session = pytest.importorskip("mpidl.torch.session")
hvd.init()

ONES = torch.ones(3)


def params() -> list[Any]:
    return [torch.nn.Parameter(torch.ones(2))]


def sgd() -> Any:
    return torch.optim.SGD(params(), 0.1)


def sampler(**state: Any) -> None:
    made = hvd.elastic.ElasticSampler(range(6))
    made.load_state_dict(state)


def parallel(**options: Any) -> None:
    hvd.DataParallel(torch.nn.Linear(3, 2), strategy="allreduce", **options).close()


REFUSED: dict[str, Callable[[], Any]] = {
    "True or False": lambda: hvd.allreduce(ONES, average="x"),
    "op=True": lambda: hvd.allreduce(ONES, op=True),
    "expected a text": lambda: hvd.allreduce(ONES, name=["x"]),
    "expected a ProcessSet": lambda: hvd.allreduce(ONES, process_set=0),
    "expected numbers": lambda: hvd.allreduce(ONES, prescale_factor="1"),
    "compression": lambda: hvd.allreduce(ONES, compression=None),
    "root_rank=False": lambda: hvd.broadcast(ONES, False),
    r"root_rank=0\.0": lambda: hvd.broadcast_object(1, 0.0),
    r"splits: [01]\.5": lambda: hvd.alltoall(ONES, [1.5] + [0.5] * (hvd.size() - 1)),
    "list of at least one": lambda: hvd.grouped_allreduce(ONES),
    "meta": lambda: hvd.allreduce(torch.ones(3, device="meta")),
    "no shape yet": lambda: hvd.allgather(torch.nn.parameter.UninitializedParameter()),
    "share memory": lambda: hvd.allreduce_(torch.ones(1).expand(3)),
    r"handle \d+\.0": lambda: hvd.poll(float(hvd.allreduce_async(ONES))),
    r"ProcessSet: 0\.5": lambda: hvd.ProcessSet([0.5]),
    "expected a ProcessSet$": lambda: hvd.remove_process_set(0),
    "init.comm": lambda: session._world_of(session.active().world, "0"),
    "optimizer of torch.optim": lambda: hvd.broadcast_optimizer_state(None),
    "state_dict, named": lambda: hvd.broadcast_parameters(ONES),
    "once": lambda: hvd.broadcast_parameters([("a", ONES), ("a", ONES)]),
    "sparse_coo": lambda: hvd.sparse_allreduce_async(None, "x"),
    "not None": lambda: hvd.DistributedOptimizer(None),
    "gradient_predivide_factor=nan": lambda: hvd.DistributedOptimizer(
        sgd(), gradient_predivide_factor=math.nan
    ),
    "sparse_as_dense=1": lambda: hvd.DistributedOptimizer(sgd(), sparse_as_dense=1),
    "backward_passes_per_step=1.5": lambda: hvd.DistributedOptimizer(
        sgd(), backward_passes_per_step=1.5
    ),
    "groups=True": lambda: hvd.DistributedOptimizer(sgd(), groups=True),
    "step.1": lambda: hvd.DistributedOptimizer(sgd()).step(1),
    "nn.Module": lambda: hvd.DataParallel(None),
    "batch_dim=-1": lambda: parallel(batch_dim=-1),
    "bucket_bytes=True": lambda: parallel(bucket_bytes=True),
    "overlap=1": lambda: parallel(overlap=1),
    "epoch=0.5": lambda: hvd.Sampler(range(6), 2).set_epoch(0.5),
    "the state has None": lambda: hvd.Sampler(range(6), 2).load_state_dict({}),
    "epochs='x'": lambda: list(hvd.loader(range(6), 2).epochs("x")),
    "collate_fn=1": lambda: hvd.loader(range(6), 2, collate_fn=1),
    "the state's epoch": lambda: sampler(processed_num=1),
    # NumPy crashed the interpreter
    "seed=matrix": lambda: hvd.elastic.ElasticSampler(
        range(6), seed=np.ones((2, 3)).view(np.matrix)
    ),
    "expected a function": lambda: hvd.elastic.run(None),
    "expected a State": lambda: hvd.elastic.run(lambda _: None)(None),
    "num_features": lambda: hvd.SyncBatchNorm("3"),
    "not 'x'": lambda: hvd.SyncBatchNorm.convert_sync_batchnorm("x"),
    "floating": lambda: hvd.SyncBatchNorm(3)(torch.ones(2, 3, dtype=torch.int64)),
    "float8_e4m3fn: expected floating": lambda: hvd.SyncBatchNorm(3)(
        torch.ones(2, 3).to(torch.float8_e4m3fn)
    ),
    "unpickled": lambda: hvd.broadcast_object(ONES.to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refused(match: str, world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match=match):
        REFUSED[match]()
    assert hvd.allreduce(ONES, op=hvd.Sum).tolist() == [world.size] * 3


def test_a_timeline_that_cannot_be_written(world: mpidl.World, tmp_path: Path) -> None:
    if world.rank == 0:
        with pytest.raises(InvalidArgument, match="start_timeline"):
            hvd.start_timeline(tmp_path)


def test_a_wrong_state_is_told_of_on_all_ranks(world: mpidl.World) -> None:
    made = hvd.DataParallel(torch.nn.Linear(3, 2), strategy="allreduce")
    state = {} if world.rank == 0 else dict(torch.nn.Linear(3, 2).state_dict())
    with pytest.raises(InvalidArgument, match=r"rank 0: .*state_dict"):
        made.load_state_dict(state)
    with pytest.raises(InvalidArgument, match="rank 0: samples=-1"):
        made.average_gradients(-1 if world.rank == 0 else 1)
    made.close()


def test_operations_can_be_sent(world: mpidl.World) -> None:
    assert hvd.broadcast_object({"op": hvd.Max})["op"].name == "max"
    assert repr(pickle.loads(pickle.dumps(hvd.Sum))) == "Sum"


def test_process_sets_that_differ(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    made = hvd.add_process_set([0])
    with pytest.raises(RankMismatch, match="remove_process_set: rank 0"):
        hvd.remove_process_set(made if world.rank == 0 else hvd.global_process_set)
    with pytest.raises(InvalidArgument, match=r"rank 0: .* has been added already"):
        hvd.add_process_set(made if world.rank == 0 else [1])
    assert hvd.remove_process_set(made)


def test_init_with_wrong_sets_leaves_nothing(world: mpidl.World) -> None:
    hvd.shutdown()
    try:
        with pytest.raises(MpidlError, match="process_sets="):
            hvd.init(process_sets="x" if world.rank == 0 else None)
        assert not hvd.is_initialized()
    finally:
        hvd.init()
