"""Layers, losses and metrics."""

from mpidl.nn.init import seed
from mpidl.nn.layers import Linear, ReLU, Sequential, Sigmoid, Tanh
from mpidl.nn.losses import accuracy, cross_entropy, l1, mse
from mpidl.nn.module import Module, Parameter

__all__ = [
    "Linear",
    "Module",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Tanh",
    "accuracy",
    "cross_entropy",
    "l1",
    "mse",
    "seed",
]
