"""Optimizers: they see only flat slices of buckets, so that an owner can update its part alone."""

from mpidl.optim.sgd import SGD, Optimizer

__all__ = ["SGD", "Optimizer"]
