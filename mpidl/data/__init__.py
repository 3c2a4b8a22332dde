"""Data sets, and how they are cut into shards and batches."""

from mpidl.data.batches import Batches, batches
from mpidl.data.dataset import ArrayDataset, Dataset
from mpidl.data.samples import digits

__all__ = ["ArrayDataset", "Batches", "Dataset", "batches", "digits"]
