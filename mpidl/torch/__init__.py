"""Horovod's interface for PyTorch over mpidl: `import mpidl.torch as hvd`.

All of `horovod.torch` is here, and works as its documentation says; besides, `DataParallel`,
`Sampler` and `loader`. Operations and objects that wait for other ranks say so: collective.
"""

from typing import Any

from mpidl.torch import elastic
from mpidl.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from mpidl.torch.compression import Compression
from mpidl.torch.differentiable import (
    allgather,
    allreduce,
    alltoall,
    broadcast,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    reducescatter,
)
from mpidl.torch.errors import HorovodInternalError, HostsUpdatedInterrupt
from mpidl.torch.grouped import (
    grouped_allgather_async,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter_async,
)
from mpidl.torch.objects import allgather_object, broadcast_object, broadcast_object_fn
from mpidl.torch.ops import (
    allgather_async,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall_async,
    barrier,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    join,
    poll,
    reducescatter_async,
    synchronize,
)
from mpidl.torch.optimizer import DistributedOptimizer
from mpidl.torch.process_sets import (
    ProcessSet,
    add_process_set,
    global_process_set,
    remove_process_set,
)
from mpidl.torch.reduce_op import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
)
from mpidl.torch.sampler import Loader, Sampler, loader
from mpidl.torch.session import (
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    rocm_built,
    shutdown,
    size,
    stop_requested,
)
from mpidl.torch.sparse import sparse_allreduce_async
from mpidl.torch.sync_batch_norm import SyncBatchNorm
from mpidl.torch.timeline import start_timeline, stop_timeline

__all__ = [
    "Adasum",
    "Average",
    "Checkpointed",
    "Compression",
    "DataParallel",
    "DistributedOptimizer",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "Loader",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "Sampler",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "loader",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_requested",
    "stop_timeline",
    "synchronize",
]


def __getattr__(name: str) -> Any:
    """Import `DataParallel` and `Checkpointed` where they are first asked for."""
    if name == "DataParallel":
        from mpidl.torch.parallel import DataParallel

        return DataParallel
    if name == "Checkpointed":
        from mpidl.torch.checkpointed import Checkpointed

        return Checkpointed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
