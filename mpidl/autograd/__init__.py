"""Automatic differentiation over NumPy and CuPy arrays, define-by-run, in both modes."""

from mpidl.autograd.check import check_gradients
from mpidl.autograd.modes import no_grad, recording
from mpidl.autograd.ops import OPS
from mpidl.autograd.picture import Picture, draw
from mpidl.autograd.tensor import Tensor, apply, tensor
from mpidl.autograd.transforms import Record, grad, jvp, trace, vjp

__all__ = [
    "OPS",
    "Picture",
    "Record",
    "Tensor",
    "apply",
    "check_gradients",
    "draw",
    "grad",
    "jvp",
    "no_grad",
    "recording",
    "tensor",
    "trace",
    "vjp",
]
