"""Optimizers: they see only flat slices of buckets, so that an owner can update its part alone."""

from mpidl.optim import schedules
from mpidl.optim.adagrad import Adagrad
from mpidl.optim.adam import Adam, AdamW
from mpidl.optim.base import Layers, Optimizer
from mpidl.optim.layerwise import LAMB, LARS
from mpidl.optim.rmsprop import RMSprop
from mpidl.optim.sgd import SGD

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
