"""Valid arguments of the operations of mpidl.torch: on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mpidl
import mpidl.torch as hvd
from mpidl.torch.optimizer import _live
from tests.fuzz.calls import Given, given
from tests.fuzz.tensors import HOSTILE as HOSTILE
from tests.fuzz.tensors import leaf, of_two_params, sparse

torch.set_num_threads(1)
hvd.init()
mpidl.init(abort_on_error=False)


def waited(made: Given) -> Given:
    return made._replace(then=hvd.synchronize)


def backward(made: Given) -> Given:
    return made._replace(then=run_backward)


def run_backward(found: Any) -> None:
    tensors = found if isinstance(found, (list, tuple)) else [found]
    torch.autograd.backward([t.abs().sum() for t in tensors if t.requires_grad])


def grads(*shape: int) -> Any:
    return leaf(*shape) * 2


#: After the tensor, of allreduce and its like.
REDUCE = (None, "x", hvd.Sum, 1.0, 1.0, hvd.global_process_set)
COMPRESSED = (None, "x", hvd.Compression.none, hvd.Sum, 1.0, 1.0, hvd.global_process_set)
SCATTER = ("x", hvd.Sum, hvd.global_process_set, 1.0, 1.0)
EVERY = ("x", hvd.global_process_set)


def begun() -> Given:
    return given(hvd.allreduce_async(torch.ones(3)))


def again() -> Given:
    hvd.shutdown()
    return given(None, None)._replace(close=start)


def start() -> None:
    hvd.shutdown()
    _live.clear()
    hvd.init()
    mpidl.init(abort_on_error=False)


def timeline() -> Given:
    from tests.fuzz.tables.training import FOLDER

    return given(FOLDER / "timeline", False)._replace(close=hvd.stop_timeline)


TABLE: dict[str, Callable[[], Given]] = {
    "torch.broadcast:broadcast_optimizer_state": lambda: given(of_two_params(), 0, None),
    "torch.broadcast:broadcast_parameters": lambda: given({"a": torch.ones(2)}, 0),
    "torch.differentiable:allgather": lambda: backward(given(grads(2, 3), *EVERY)),
    "torch.differentiable:allreduce": lambda: backward(given(grads(2, 3), *COMPRESSED)),
    "torch.differentiable:alltoall": lambda: given(grads(2, 3), [2], *EVERY)._replace(
        then=lambda found: run_backward(found[0])
    ),
    "torch.differentiable:broadcast": lambda: backward(given(grads(2, 3), 0, *EVERY)),
    "torch.differentiable:grouped_allgather": lambda: backward(given([grads(2), grads(3)], *EVERY)),
    "torch.differentiable:grouped_allreduce": lambda: backward(
        given([grads(2), grads(3)], *COMPRESSED)
    ),
    "torch.differentiable:grouped_reducescatter": lambda: backward(
        given([grads(2), grads(3)], "x", hvd.Compression.none, *SCATTER[1:])
    ),
    "torch.differentiable:reducescatter": lambda: backward(
        given(grads(2, 3), "x", hvd.Compression.none, *SCATTER[1:])
    ),
    "torch.grouped:grouped_allgather_async": lambda: waited(given([torch.ones(2)], *EVERY)),
    "torch.grouped:grouped_allreduce_": lambda: given([torch.ones(2)], *REDUCE),
    "torch.grouped:grouped_allreduce_async": lambda: waited(given([torch.ones(2)], *REDUCE)),
    "torch.grouped:grouped_allreduce_async_": lambda: waited(given([torch.ones(2)], *REDUCE)),
    "torch.grouped:grouped_reducescatter_async": lambda: waited(given([torch.ones(2)], *SCATTER)),
    "torch.objects:allgather_object": lambda: given({"a": 1}, *EVERY),
    "torch.objects:broadcast_object": lambda: given({"a": 1}, 0, *EVERY),
    "torch.objects:broadcast_object_fn": lambda: given(0, *EVERY)._replace(
        then=lambda f: f({"a": 1})
    ),
    "torch.ops:allgather_async": lambda: waited(given(torch.ones(2, 3), *EVERY)),
    "torch.ops:allreduce_": lambda: given(torch.ones(2, 3), *REDUCE),
    "torch.ops:allreduce_async": lambda: waited(given(torch.ones(2, 3), *REDUCE)),
    "torch.ops:allreduce_async_": lambda: waited(given(torch.ones(2, 3), *REDUCE)),
    "torch.ops:alltoall_async": lambda: waited(given(torch.ones(2, 3), torch.tensor([2]), *EVERY)),
    "torch.ops:barrier": lambda: given(hvd.global_process_set),
    "torch.ops:broadcast_": lambda: given(torch.ones(2, 3), 0, *EVERY),
    "torch.ops:broadcast_async": lambda: waited(given(torch.ones(2, 3), 0, *EVERY)),
    "torch.ops:broadcast_async_": lambda: waited(given(torch.ones(2, 3), 0, *EVERY)),
    "torch.ops:join": lambda: given(-1),
    "torch.ops:poll": begun,
    "torch.ops:reducescatter_async": lambda: waited(given(torch.ones(2, 3), *SCATTER)),
    "torch.ops:synchronize": begun,
    "torch.process_sets:ProcessSet": lambda: given([0]),
    "torch.process_sets:add_process_set": lambda: given([0])._replace(refused=True),
    "torch.process_sets:remove_process_set": lambda: given(hvd.global_process_set),
    "torch.session:init": again,
    "torch.sparse:sparse_allreduce_async": lambda: waited(
        given(sparse(2, 3), "x", hvd.Sum, hvd.global_process_set)
    ),
    "torch.timeline:start_timeline": timeline,
}
