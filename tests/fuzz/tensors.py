"""Tensors, modules and optimizers of torch that no function expects, as in `hostile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mpidl.torch as hvd

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
