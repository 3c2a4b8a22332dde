"""Losses: means over the samples given. And metrics: plain numbers, with the same mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpidl.functional import binary_cross_entropy, cross_entropy, kl, l1, mse

if TYPE_CHECKING:
    from mpidl.array import Array
    from mpidl.autograd import Tensor

__all__ = ["accuracy", "binary_cross_entropy", "cross_entropy", "kl", "l1", "mse"]


def accuracy(logits: Tensor, labels: Array) -> float:
    """Return the share of n samples whose largest logit (n, classes) is labels (n,); 0 if n = 0."""
    return float((logits.data.argmax(axis=1) == labels).sum()) / max(1, len(labels))
