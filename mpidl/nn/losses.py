"""Losses: means over the samples given. And metrics: plain numbers, with the same mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.autograd import Tensor, apply

if TYPE_CHECKING:
    from mpidl.array import Array


def cross_entropy(logits: Tensor, labels: Array) -> Tensor:
    """Return the mean of -log softmax(logits (n, classes))[labels (n,), integers]; 0 if n = 0."""
    return apply("cross_entropy", logits, labels=labels)


def mse(output: Tensor, target: Array) -> Tensor:
    """Return the mean squared error of two arrays of the same shape; 0 if they are empty."""
    return apply("mse", output, target=target)


def l1(output: Tensor, target: Array) -> Tensor:
    """Return the mean absolute error of two arrays of the same shape; 0 if they are empty."""
    return apply("l1", output, target=target)


def accuracy(logits: Tensor, labels: Array) -> float:
    """Return the share of n samples whose largest logit (n, classes) is labels (n,); 0 if n = 0."""
    return float((logits.data.argmax(axis=1) == labels).sum()) / max(1, len(labels))
