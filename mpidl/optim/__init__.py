"""Optimizers: they see only flat slices of buckets, so that an owner can update its part alone."""

from typing import TYPE_CHECKING, Any

from mpidl.optim.adagrad import Adagrad
from mpidl.optim.adam import Adam, AdamW
from mpidl.optim.base import Layers, Optimizer
from mpidl.optim.layerwise import LAMB, LARS
from mpidl.optim.rmsprop import RMSprop
from mpidl.optim.sgd import SGD

if TYPE_CHECKING:
    from mpidl.optim import schedules

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Layers",
    "Optimizer",
    "RMSprop",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """Import `schedules` when it is first asked for: its many dataclasses take a while to make."""
    if name == "schedules":
        import importlib

        return importlib.import_module("mpidl.optim.schedules")
    raise AttributeError(f"module {__name__} has no attribute {name}")
