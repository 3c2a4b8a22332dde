"""Fewer bytes on the wire: tensors are narrowed before they travel, and widened after."""

from __future__ import annotations

from typing import Any

import torch

Tensor = Any
Context = Any


class Compressor:
    """What narrows a tensor, and widens it again; `DistributedOptimizer` takes any of these."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Context]:
        """Return what is to travel, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: Tensor, ctx: Context) -> Tensor:
        """Return what has arrived as it was before."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Context]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: Context) -> Tensor:  # noqa: ARG004
        """Return the tensor itself."""
        return tensor


class _Half(Compressor):
    dtype: Any

    @classmethod
    def compress(cls, tensor: Tensor) -> tuple[Tensor, Context]:
        """Return floats in 16 bits, and the dtype they had; others as they are."""
        if not tensor.dtype.is_floating_point:
            return tensor, None
        return tensor.to(cls.dtype), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: Context) -> Tensor:
        """Return the tensor in the dtype it had."""
        return tensor if ctx is None else tensor.to(ctx)


class FP16Compressor(_Half):
    """Sends floats as float16: 10 bits of mantissa, magnitudes up to 65504."""

    dtype = torch.float16


class BF16Compressor(_Half):
    """Sends floats as bfloat16: 7 bits of mantissa, magnitudes as in float32."""

    dtype = torch.bfloat16


class Compression:
    """The compressors there are. Sums of both halves are made in float32, and rounded once."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
