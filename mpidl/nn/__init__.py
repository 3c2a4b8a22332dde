"""Layers, losses, metrics and first weights."""

from mpidl.nn import init, random
from mpidl.nn.activation import GELU, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh, Threshold
from mpidl.nn.attention import MultiHeadAttention, TransformerBlock
from mpidl.nn.conv import AvgPool2d, Conv2d, MaxPool2d
from mpidl.nn.dropout import Dropout
from mpidl.nn.linear import Embedding, Flatten, Linear, Sequential
from mpidl.nn.losses import (
    accuracy,
    binary_accuracy,
    binary_cross_entropy,
    cross_entropy,
    kl,
    l1,
    mse,
)
from mpidl.nn.module import Buffer, Module, Parameter
from mpidl.nn.norm import BatchNorm1d, BatchNorm2d, LayerNorm
from mpidl.nn.random import seed

__all__ = [
    "GELU",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Buffer",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "Threshold",
    "TransformerBlock",
    "accuracy",
    "binary_accuracy",
    "binary_cross_entropy",
    "cross_entropy",
    "init",
    "kl",
    "l1",
    "mse",
    "random",
    "seed",
]
