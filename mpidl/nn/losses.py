"""Losses: means over the samples given. And metrics: plain numbers, with the same mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.errors import InvalidArgument
from mpidl.functional import binary_cross_entropy, cross_entropy, kl, l1, mse
from mpidl.refuse import refuses

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.autograd import Tensor

__all__ = [
    "accuracy",
    "binary_accuracy",
    "binary_cross_entropy",
    "cross_entropy",
    "kl",
    "l1",
    "mse",
]


@refuses
def accuracy(logits: Tensor, labels: Array) -> float:
    """Return the share of n samples whose largest logit (n, classes) is labels (n,); 0 if n = 0."""
    return float((logits.data.argmax(axis=1) == labels).sum()) / max(1, len(labels))


@refuses
def binary_accuracy(logits: Tensor, target: Array) -> float:
    """Return the share of targets (n, ...), each 0 or 1, that are 1 just where a logit is above 0.

    Logits of the same shape; one of the two may have an axis of length 1 more at its end. 0 if
    empty. Raises InvalidArgument for other shapes.
    """
    found, wanted = logits.shape, target.shape
    if found != wanted and found != (*wanted, 1) and wanted != (*found, 1):
        raise InvalidArgument(
            f"binary_accuracy of logits {found}: expected targets of that shape, found {wanted}"
        )
    right = (logits.data > 0).reshape(wanted) == target
    return float(right.sum()) / max(1, target.size)
