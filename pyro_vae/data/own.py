"""Images of your own: NumPy files and folders of pictures."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torchvision
from PIL import Image, ImageOps

from pyro_vae.data.images import Binarization, Dataset, Images, shuffled
from pyro_vae.errors import DataError, reason_of


class OwnImages(Dataset):
    """Images that a user brings, in files.

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
        reason = reason_of(error)
        if "pickle" in reason:  # NumPy's words tell how to load it unsafely
            reason = "it holds Python objects, or no arrays at all; save arrays of numbers"
        raise DataError(f"{path} is no readable {kind}: {reason}") from error


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
        path: the folder. If it has subfolders train and test, others beside them are not read; if it has none, a tenth
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
            train, train_labels = shuffled(self.binarization_seed, train, train_labels)
        elif any(parts.values()):
            raise DataError(f"{self.path} must have {' and '.join(f'{name}/<class>/' for name in parts)}, or neither")
        else:
            images, labels, _ = self._read(self.path)
            images, labels = shuffled(self.binarization_seed, images, labels)
            num_test = self._num_test(images)
            test, train = np.split(images, [num_test])
            test_labels, train_labels = np.split(cast(np.ndarray, labels), [num_test])
        classes = len(np.unique(cast(np.ndarray, train_labels)))
        print(f"{self.path}: {len(train) + len(test):,} images of {classes} classes")
        return self._images(train, test, train_labels, test_labels)

    def _read(self, folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images, their labels, and the names of the classes."""
        try:
            files = torchvision.datasets.ImageFolder(folder, loader=self._open)
        except OSError as error:
            raise DataError(f"expected image files {folder}/<class>/*.png: {reason_of(error).rstrip('. ')}") from error
        return np.stack([image for image, _ in files]), np.array(files.targets), files.classes

    def _open(self, file: str) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # Pillow would clip them
                    raise ValueError(f"expected 8 bits per channel, got pixels of mode {image.mode}")
                image = ImageOps.exif_transpose(image).convert("L" if self.grey else "RGB")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DataError(f"{file} is no readable image: {reason_of(error)}") from error
        pixels = np.array(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR))
        return pixels if self.grey else pixels.transpose(2, 0, 1)
