"""Data sets of images, and how pixels become observations."""

from pyro_vae.errors import need_extra

need_extra("runs", ["PIL", "scipy", "sklearn", "torchvision"])

from pyro_vae.data.fetched import KMNIST, MNIST, Digits, FashionMNIST, Omniglot, StaticMNIST, cache_folder
from pyro_vae.data.images import ENCODINGS, Batches, Data, Dataset, Images
from pyro_vae.data.own import ImageFolder, Npy, Npz

__all__ = [
    "ENCODINGS",
    "KMNIST",
    "MNIST",
    "Batches",
    "Data",
    "Dataset",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "Images",
    "Npy",
    "Npz",
    "Omniglot",
    "StaticMNIST",
    "cache_folder",
]
