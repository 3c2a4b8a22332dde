"""Reverse-mode automatic differentiation over NumPy and CuPy arrays, define-by-run."""

from mpidl.autograd.check import check_gradients
from mpidl.autograd.ops import OPS
from mpidl.autograd.tensor import Tensor, apply, no_grad, recording, tensor

__all__ = ["OPS", "Tensor", "apply", "check_gradients", "no_grad", "recording", "tensor"]
