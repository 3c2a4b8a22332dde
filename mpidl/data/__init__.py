"""Data sets, and how they are cut into shards and batches."""

from mpidl.data.batches import Batches, batches
from mpidl.data.cifar import cifar10
from mpidl.data.dataset import ArrayDataset, Dataset, ImageDataset
from mpidl.data.files import FileDataset, npy, npz
from mpidl.data.hdf5 import hdf5
from mpidl.data.idx import mnist, read_idx
from mpidl.data.loader import Loader
from mpidl.data.samples import breast_cancer, diabetes, digits, wine
from mpidl.data.scale import MinMaxScaler, ScaledDataset, Scaler, StandardScaler
from mpidl.data.text import TextDataset, Vocabulary, text

__all__ = [
    "ArrayDataset",
    "Batches",
    "Dataset",
    "FileDataset",
    "ImageDataset",
    "Loader",
    "MinMaxScaler",
    "ScaledDataset",
    "Scaler",
    "StandardScaler",
    "TextDataset",
    "Vocabulary",
    "batches",
    "breast_cancer",
    "cifar10",
    "diabetes",
    "digits",
    "hdf5",
    "mnist",
    "npy",
    "npz",
    "read_idx",
    "text",
    "wine",
]
