"""Data-parallel training over MPI.

`import mpidl` starts nothing; `mpidl.init()` starts MPI.
"""

from importlib import import_module
from typing import Any

from mpidl import autograd, data, errors, functional, nn, optim, signals, strategies
from mpidl.autograd import Tensor, no_grad, tensor
from mpidl.average import average
from mpidl.errors import MpidlError
from mpidl.history import Epoch, History
from mpidl.onnx import export_onnx
from mpidl.parallel import DataParallel
from mpidl.trace import range as range  # noqa: A004  # not in __all__: `import *` leaves Python's
from mpidl.trainer import Trainer
from mpidl.weights import load, save
from mpidl.world import World, init

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "Epoch",
    "History",
    "MpidlError",
    "Tensor",
    "Trainer",
    "World",
    "autograd",
    "average",
    "checkpoint",
    "data",
    "errors",
    "export_onnx",
    "functional",
    "init",
    "load",
    "nn",
    "no_grad",
    "optim",
    "plot_history",
    "save",
    "signals",
    "strategies",
    "tensor",
]


def __getattr__(name: str) -> Any:
    """Import what most scripts do not need, when it is asked for."""
    if name == "checkpoint":
        return import_module("mpidl.checkpoint")
    if name == "plot_history":
        return import_module("mpidl.report.history").plot_history
    raise AttributeError(f"module 'mpidl' has no attribute {name!r}")
