"""Data sets, and how what they store becomes observations."""

from pyro_vae.errors import need_extra

need_extra("runs", ["PIL", "pandas", "scipy", "sklearn", "torchvision"])

from pyro_vae.data.datasets import Batches, Column, Data, Schema, Source
from pyro_vae.data.fetched import KMNIST, MNIST, Digits, FashionMNIST, Omniglot, StaticMNIST, cache_folder
from pyro_vae.data.images import ENCODINGS, Dataset, ImageData, Images
from pyro_vae.data.own import ImageFolder, Npy, Npz
from pyro_vae.data.sequences import SequenceData, Sequences
from pyro_vae.data.tables import Table, TableData, heads

__all__ = [
    "ENCODINGS",
    "KMNIST",
    "MNIST",
    "Batches",
    "Column",
    "Data",
    "Dataset",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "Images",
    "Npy",
    "Npz",
    "Omniglot",
    "Schema",
    "SequenceData",
    "Sequences",
    "Source",
    "StaticMNIST",
    "Table",
    "TableData",
    "cache_folder",
    "heads",
]
