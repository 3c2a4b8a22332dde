"""Valid arguments of the operations of mpidl.torch, and tensors that nobody expects: on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mpidl
import mpidl.torch as hvd
from mpidl.torch.optimizer import _live
from tests.fuzz.calls import Given, given

torch.set_num_threads(1)
hvd.init()
mpidl.init(abort_on_error=False)
nn = torch.nn


class Subclass(torch.Tensor):  # type: ignore[misc]
    """A subclass of torch's tensor."""


class Wrong:
    """A compressor that does not do what one does."""

    compress = decompress = staticmethod(lambda tensor: tensor)


def leaf(*shape: int) -> Any:
    return torch.ones(shape, requires_grad=True)


def sparse(*shape: int) -> Any:
    return torch.ones(shape).to_sparse()


def of_two_params() -> Any:
    return torch.optim.SGD([{"params": [leaf(2)], "lr": 0.1}, {"params": [leaf(3)]}], lr=0.2)


def quantized() -> Any:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def inference() -> Any:
    with torch.inference_mode():
        return torch.ones(2, 3)


#: What this and the training of torch are given besides.
HOSTILE: dict[str, Callable[[], Any]] = {
    "tensor 0-d": lambda: torch.tensor(1.0),
    "tensor (0,)": lambda: torch.ones(0),
    "tensor (0, 3)": lambda: torch.ones(0, 3),
    "tensor (2, 3)": lambda: torch.ones(2, 3),
    "tensor (3, 2).T": lambda: torch.ones(3, 2).T,
    "tensor expanded": lambda: torch.ones(1).expand(2, 3),
    "tensor overlapping": lambda: torch.ones(4).as_strided((2, 3), (1, 1)),
    "tensor NaN": lambda: torch.full((2, 3), torch.nan),
    "tensor sparse": lambda: sparse(2, 3),
    "tensor sparse, uncoalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0]], [1.0, 2.0], (2,), check_invariants=False
    ),
    "tensor sparse, hybrid": lambda: torch.ones(2, 3).to_sparse(1),
    "tensor csr": lambda: torch.eye(2).to_sparse_csr(),
    "tensor meta": lambda: torch.ones(2, 3, device="meta"),
    "tensor quantized": quantized,
    "tensor complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "tensor conj": lambda: torch.ones(2, 3, dtype=torch.complex64).conj(),
    "tensor neg": lambda: torch.ones(2, 3, dtype=torch.complex64).conj().imag,
    "tensor float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    "tensor bfloat16": lambda: torch.ones(2, 3, dtype=torch.bfloat16),
    "tensor float64": lambda: torch.ones(2, 3, dtype=torch.float64),
    "tensor int64": lambda: torch.ones(2, 3, dtype=torch.int64),
    "tensor int64 2**62": lambda: torch.full((2,), 2**62),
    "tensor uint16": lambda: torch.ones(2, 3, dtype=torch.uint16),
    "tensor bool": lambda: torch.ones(2, 3, dtype=torch.bool),
    "tensor leaf": lambda: leaf(2, 3),
    "tensor of a graph": lambda: leaf(2, 3) * 2,
    "tensor in inference mode": inference,
    "tensor Subclass": lambda: torch.ones(2, 3).as_subclass(Subclass),
    "tensor nested": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "Parameter": lambda: nn.Parameter(torch.ones(2, 3)),
    "UninitializedParameter": nn.parameter.UninitializedParameter,
    "[tensor]": lambda: [torch.ones(2, 3)],
    "[tensor, None]": lambda: [torch.ones(2, 3), None],
    "[tensor twice]": lambda: [torch.ones(2, 3)] * 2,
    "{1: tensor}": lambda: {1: torch.ones(2)},
    "iter([tensor])": lambda: iter([torch.ones(2)]),
    "pairs": lambda: [("a", torch.ones(2)), ("a", torch.ones(2))],
    "pairs the other way": lambda: [(torch.ones(2), "a")],
    "torch.float32": lambda: torch.float32,
    "torch.device": lambda: torch.device("cpu"),
    "Linear": lambda: nn.Linear(3, 2),
    "LazyLinear": lambda: nn.LazyLinear(2),
    "frozen": lambda: nn.Linear(3, 2).requires_grad_(False),
    "half": lambda: nn.Linear(3, 2).half(),
    "on meta": lambda: nn.Linear(3, 2, device="meta"),
    "Identity": nn.Identity,
    "nn.Linear": lambda: nn.Linear,
    "SGD": lambda: torch.optim.SGD([leaf(2)], 0.1),
    "SGD of groups": of_two_params,
    "torch.optim.SGD": lambda: torch.optim.SGD,
    "ProcessSet([0])": lambda: hvd.ProcessSet([0]),
    "hvd.Adasum": lambda: hvd.Adasum,
    "hvd.Min": lambda: hvd.Min,
    "Compression": lambda: hvd.Compression,
    "Compression.fp16": lambda: hvd.Compression.fp16,
    "Wrong": lambda: Wrong,
}


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
    "torch.differentiable:grouped_allgather": lambda: backward(
        given([grads(2), grads(3)], *EVERY)
    ),
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
    "torch.grouped:grouped_reducescatter_async": lambda: waited(
        given([torch.ones(2)], *SCATTER)
    ),
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
