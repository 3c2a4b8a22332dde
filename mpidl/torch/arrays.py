"""Tensors as NumPy arrays, and back."""

from __future__ import annotations

from typing import Any

import torch

from mpidl.errors import UnsupportedDtype
from mpidl.torch.arguments import dense

Tensor = Any
Array = Any

#: What the engine calls the dtypes of PyTorch.
DTYPES: dict[Any, str] = {
    getattr(torch, name): name
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32"),
        *("float64", "complex64", "complex128", "uint16", "uint32", "uint64"),
    )
}


def host_array(tensor: Tensor) -> tuple[Tensor, Array, str]:
    """Return a contiguous tensor in host memory, its NumPy array, and the name of the dtype.

    That tensor is `tensor` itself where it can be: then nothing is copied, and what changes the
    array changes the tensor. Of bfloat16, which NumPy lacks, the array has the bits, as uint16.

    A tensor on a GPU is copied to pinned memory. That path has not been run yet: it awaits a
    machine with a GPU.

    Raises InvalidArgument for what is no dense tensor, and UnsupportedDtype.
    """
    dense(tensor)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedDtype(
            f"a tensor of {tensor.dtype}: expected one of {', '.join(DTYPES.values())}"
        )
    host = tensor.detach()
    if not host.is_cpu:
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=host.is_cuda)
        host = pinned.copy_(host)
    # also where the conjugate or the negative is due yet, as NumPy must not be told of it
    host = host.resolve_conj().resolve_neg().contiguous()
    return host, bits(host), dtype


def bits(tensor: Tensor) -> Array:
    """Return the array of a contiguous tensor in host memory."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("uint16")
    return tensor.numpy()


def tensor_of(array: Array, like: Tensor) -> Tensor:
    """Return the tensor of an array that the engine made, with the dtype and device of `like`."""
    if like.dtype is torch.bfloat16:
        made = torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array)
    return made.to(like.device)
