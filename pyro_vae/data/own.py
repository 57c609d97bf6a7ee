"""Images of your own: NumPy files and folders of pictures."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image, ImageOps

from pyro_vae.data.datasets import Origin, check_file
from pyro_vae.data.images import MOST, Binarization, Dataset, Images, shuffled
from pyro_vae.errors import DataError, reason_of

RANGES = 8
"""Whose largest pixels differ by more than this factor, training and test images are scaled otherwise."""


class OwnImages(Dataset):
    """Images that a user brings, in files.

    Args:
        path: where they are.
        num_validation: images held out from the end of the training set, at least 1; null: a tenth of them.
        image_shape: [C, H, W] of flat images (N, C * H * W), each at least 1; null: arrays already have such a shape.
        max_value: the largest value that whole numbers can have, at least 1, such as 65535 of 16-bit images; null: 255,
            or the largest that there is, where that is more.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
        image_shape: Sequence[int] | None = None,
        max_value: int | None = None,
    ):
        super().__init__(data_dir, binarization, binarization_seed, num_validation)
        self.path = Path(path)
        self.max_value = max_value
        if max_value is not None and not 1 <= max_value <= MOST:
            raise ValueError(f"max_value must be at least 1 and at most {MOST:,}, got {max_value}")
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
        """Images in their shape, with the range of their pixels."""
        for part, array in (("training", train), ("test", test)):
            if array.dtype.kind not in "biuf":
                raise DataError(f"{self.path}, {part} images: expected numbers, got {array.dtype}")
        train, test = (self._whole(array) for array in (train, test))
        whole = all(np.issubdtype(array.dtype, np.integer) for array in (train, test))
        largest = max((int(array.max()) for array in (train, test) if array.size), default=0) if whole else 1
        if whole and self.max_value is None and largest <= 1:
            raise DataError(
                f"{self.path}: whole numbers are read as 0..255, and none is above 1; save real numbers, or say "
                "--dataset.max_value 1"
            )
        if not isinstance(self, ImageFolder):  # pictures say themselves in which range they are
            self._check_ranges(train, test)
        max_value = max(255, largest) if self.max_value is None else self.max_value
        train, test = self._shaped(train, "training"), self._shaped(test, "test")
        return Images(train, test, max_value if whole else 1, train_labels, test_labels)

    def _check_ranges(self, train: np.ndarray, test: np.ndarray) -> None:
        """Refuse training and test images that seem to be scaled otherwise, unless it is said how they are."""
        if self.max_value is not None or not train.size or not test.size:
            return
        largest = {"training": float(train.max()), "test": float(test.max())}
        (less, low), (more, high) = sorted(largest.items(), key=lambda item: item[1])
        whole = all(np.issubdtype(array.dtype, np.integer) for array in (train, test))
        if high > (MOST if whole else 1) or not high > RANGES * max(low, 0):  # what is out of range is refused below
            return
        told = "; if they are of one range, say so: --dataset.max_value 255, or what it is" if whole else ""
        raise DataError(
            f"{self.path}: {more} images are up to {high:g}, {less} images up to {low:g}: bring both to one range{told}"
        )

    @staticmethod
    def _whole(array: np.ndarray) -> np.ndarray:
        """Real numbers that are all whole, and not all 0 and 1, as these whole numbers; booleans as real ones."""
        if array.dtype == bool:
            return array.astype(np.float32)
        real = np.issubdtype(array.dtype, np.floating) and array.size and np.isfinite(array).all()
        if real and array.max() > 1 and array.max() <= MOST and (array == np.floor(array)).all():
            return array.astype(np.int64)
        return array

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


def load_arrays(path: Path, kind: str) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a ``.npy`` file, or those of an ``.npz`` archive by name."""
    check_file(path)
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

    Pixels are whole numbers, of 8 bits or counts of any size, or real numbers in 0..1. ``train_labels`` and
    ``test_labels``, ``(N,)``, are optional.

    Args:
        path: the ``.npz`` file.
    """

    def read(self) -> Images:
        arrays = load_arrays(self.path, ".npz archive")
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
        path: the ``.npy`` file, with whole numbers, of 8 bits or counts of any size, or real numbers in 0..1.
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
        max_value: int | None = None,
    ):
        super().__init__(data_dir, path, binarization, binarization_seed, num_validation, image_shape, max_value)
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
        origin = Origin("place", str(self.path), range(len(train), len(train) + len(test)))
        return self._images(train, test)._replace(origin=None if self.test_path else origin)

    def _array(self, path: Path) -> np.ndarray:
        array = load_arrays(path, ".npy file")
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path} is no readable .npy file: it is an archive of arrays; use --dataset Npz")
        return array


class ImageFolder(OwnImages):
    """Your own image files: ``path/<class>/*.png`` or, without classes, ``path/*.png``.

    Either is looked for in ``path/train`` and ``path/test``, if these are there. Labels are the numbers of the classes
    in alphabetical order. Training images are shuffled by ``binarization_seed``, so that the last ones, which are held
    out, are of all classes. Grey pictures of 16 bits are taken as they are, and those of 8 bits beside them brought to
    their range.

    Args:
        path: the folder. If it has subfolders train and test, others beside them are not read; if it has none, a tenth
            of its images, but at least 2, chosen by binarization_seed, are the test set. Files named .png, .jpg, .bmp,
            .tif, .webp, .ppm or .pgm are read.
        size: height and width in pixels, at least 1, or [height, width]: the largest part of this shape in the middle
            of an image is brought to it.
        grey: one channel of grey values; otherwise red, green and blue. Transparency is ignored.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        size: int | Sequence[int] = 28,
        grey: bool = True,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        super().__init__(data_dir, path, binarization, binarization_seed, num_validation)
        shape = (size, size) if isinstance(size, int) else tuple(size)
        if len(shape) != 2 or min(shape) < 1:
            shown = size if isinstance(size, int) else list(size)
            raise ValueError(f"size must be at least 1, or [height, width], each at least 1, got {shown}")
        self.size = shape[0], shape[1]
        self.grey = grey
        self._greyed = False

    def read(self) -> Images:
        parts = {name: self._has_images(self.path / name) for name in ("train", "test")}
        if all(parts.values()):
            (train, train_labels, classes, _), (test, test_labels, test_classes, files) = (
                self._read(self.path / name) for name in parts
            )
            if odd := set(classes) ^ set(test_classes):
                raise DataError(f"{self.path}: train/ and test/ must have the same classes, only one has {min(odd)}/")
            train, train_labels = shuffled(self.binarization_seed, train, train_labels)
        elif any(parts.values()):
            raise DataError(f"{self.path} must have {' and '.join(f'{name}/<class>/' for name in parts)}, or neither")
        else:
            images, labels, classes, files = self._read(self.path)
            images, labels = shuffled(self.binarization_seed, images, labels)
            named, _ = shuffled(self.binarization_seed, np.array(files), None)
            num_test = self._num_test(images)
            test, train = np.split(images, [num_test])
            test_labels, train_labels = (None, None) if labels is None else np.split(labels, [num_test])
            files = named[:num_test].tolist()
        told_of = [f"{place} {name}" for place, name in enumerate(classes)]
        shown = told_of if len(told_of) <= 12 else [*told_of[:6], "...", told_of[-1]]
        of = f" of {len(classes)} classes: {', '.join(shown)}" if classes else ""
        told = "; colours are read as grey values, --dataset.grey false keeps them" if self._greyed else ""
        print(f"{self.path}: {len(train) + len(test):,} images{of}{told}")
        if sixteen := {np.dtype(np.uint16)} & {train.dtype, test.dtype}:
            self.max_value = 65535
        train, test = (wide(part) if sixteen else part for part in (train, test))
        origin = Origin("file", str(self.path), files)
        return self._images(train, test, train_labels, test_labels)._replace(origin=origin)

    def _has_images(self, folder: Path) -> bool:
        return any(folder.glob("*/")) or bool(self._flat(folder))

    @staticmethod
    def _flat(folder: Path) -> list[Path]:
        known = torchvision.datasets.folder.IMG_EXTENSIONS
        return sorted(file for file in folder.glob("*") if file.suffix.lower() in known and file.is_file())

    def pictures(self, folder: Path) -> tuple[np.ndarray, list[str]]:
        """The pictures of a folder or its subfolders, ``(N, H, W)`` or ``(N, C, H, W)``, and the names of the files.

        Raises:
            DataError: if there is none, or one cannot be read.
        """
        files = self._flat(folder) or [file for each in sorted(folder.glob("*/")) for file in self._flat(each)]
        if not files:
            raise DataError(
                f"{folder} holds no picture; those named .png, .jpg, .bmp, .tif, .webp, .ppm or .pgm are read"
            )
        return _stacked([self._open(str(file)) for file in files]), [str(file.relative_to(folder)) for file in files]

    def picture(self, file: Path) -> np.ndarray:
        """One picture, ``(H, W)`` or ``(C, H, W)``."""
        return self._open(str(file))

    def _read(self, folder: Path) -> tuple[np.ndarray, np.ndarray | None, list[str], list[str]]:
        """Images, their labels, the names of the classes, if the folder has subfolders, and those of the files."""
        _check_links(folder)
        flat = self._flat(folder)
        if flat and not any(folder.glob("*/")):
            return _stacked([self._open(str(file)) for file in flat]), None, [], self._inside(flat)
        try:
            files = torchvision.datasets.ImageFolder(folder, loader=self._open)
        except OSError as error:
            raise DataError(
                f"expected image files {folder}/<class>/*.png, or {folder}/*.png: {reason_of(error).rstrip('. ')}"
            ) from error
        names = self._inside(Path(name) for name, _ in files.samples)
        return _stacked([image for image, _ in files]), np.array(files.targets), files.classes, names

    def _inside(self, files: Iterable[Path]) -> list[str]:
        """Files by their names in the folder of all."""
        return [str(file.relative_to(self.path)) for file in files]

    def _open(self, file: str) -> np.ndarray:
        check_file(Path(file))
        try:
            with Image.open(file) as image:
                sixteen = image.mode.startswith("I;16") and self.grey
                if image.mode[0] in "IF" and not sixteen:  # Pillow would clip them
                    wanted = "8 or 16 bits" if self.grey else "8 bits"
                    raise ValueError(f"expected {wanted} per channel, got pixels of mode {image.mode}")
                self._greyed |= self.grey and image.mode[:3] in ("RGB", "CMY", "YCb")
                mode = "I" if sixteen else "L" if self.grey else "RGB"
                image = ImageOps.exif_transpose(image).convert(mode)
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DataError(f"{file} is no readable image: {reason_of(error)}") from error
        pixels = np.array(ImageOps.fit(image, (self.size[1], self.size[0]), Image.Resampling.BILINEAR))
        if sixteen:
            return pixels.clip(0, 65535).astype(np.uint16)
        return pixels if self.grey else pixels.transpose(2, 0, 1)


def _check_links(folder: Path) -> None:
    """Refuse a link that leads back to a folder that it is in: its images would be read again and again."""
    for place, folders, _ in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        for link in (os.path.join(place, each) for each in folders):
            target = os.path.realpath(link)
            if os.path.islink(link) and os.path.commonpath([here, target]) == target:
                raise DataError(f"{link} is a link back to {target}, which it is in: the images would be read for ever")


def wide(pixels: np.ndarray) -> np.ndarray:
    """Pixels of 8 bits in the range of those of 16."""
    return pixels if pixels.dtype == np.uint16 else 257 * pixels.astype(np.uint16)


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """Images of 8 bits or, if any is, of 16, as one array."""
    return np.stack([wide(each) for each in images] if any(each.dtype == np.uint16 for each in images) else images)
