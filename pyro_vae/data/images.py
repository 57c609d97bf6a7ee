"""Image data sets, kept whole on the device as pixels, and the binarization that turns pixels into observations.

Validation images are the last of the training images. Binarized validation and test images are drawn once, from a
seed of the data set's own, so that runs with different seeds share them.
"""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.datasets import Column, Data, Origin, Pixels, Schema, Source, held_out
from pyro_vae.errors import DataError
from pyro_vae.parts.likelihoods import Likelihood

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


MOST = 2**24
"""Whole numbers up to this are exact as observations, which are of single precision."""


MOST_CLASSES = 1000
"""A condition has one number for each class."""


class Images(NamedTuple):
    """Images as they are stored: ``(N, H, W)`` or ``(N, C, H, W)``, pixels from 0 to ``max_value``; labels ``(N,)``.

    Pixels are whole numbers, of 8 bits or of more, or real ones; ``max_value`` is at most 2^24. ``origin`` says where
    the test images were read, if that is not in their order.
    """

    train: np.ndarray
    test: np.ndarray
    max_value: int
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    origin: Origin | None = None


class Dataset(Source):
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
    """Images held out unless told otherwise; None: a tenth."""

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

    def load(self, device: torch.device | str = "cpu") -> "ImageData":
        """Read the images and bring them to ``device``.

        Raises:
            DataError: if they cannot be had, are damaged, or do not hold pixels in their range.
        """
        images = self.read()
        if not isinstance(images, Images):
            raise DataError(f"{type(self).__name__}.read must return Images(...), it made {type(images).__name__}")
        return ImageData(self, images, device)


class ImageData(Data):
    """Images on a device, see :class:`Data`.

    Args:
        dataset: the settings.
        images: the images as stored.
        device: where all tensors live.

    Attributes:
        image_shape: ``(C, H, W)``.
        train_pixels: training images as stored, ``(N, X)``.
        validation, test: observations ``(N, X)``, float32, fixed; or, with a condition, ``(x, c)``.
    """

    _condition: Tensor | None = None

    def __init__(self, dataset: Dataset, images: Images, device: torch.device | str):
        name = type(dataset).__name__
        train = _check_pixels(images.train, images.max_value, f"{name}, training images")
        test = _check_pixels(images.test, images.max_value, f"{name}, test images")
        if train.shape[1:] != test.shape[1:]:
            raise DataError(f"{name}: training images have shape {train.shape[1:]}, test images {test.shape[1:]}")
        if len(test) < 2:
            raise DataError(f"{name}: a mean over test images with its error needs at least 2 of them, there is 1")
        extremes = ((train == 0) | (train == images.max_value)).mean()
        if dataset.binarization == "dequantized" and train.dtype == np.float32 and extremes > 1e-3:
            raise DataError(
                f"{name}: {extremes:.0%} of the real-valued pixels are exactly 0 or 1, where a density grows without "
                "bound: save whole numbers in 0..255, to which noise is added, or add noise yourself"
            )
        last = held_out(len(train), dataset.num_validation, name)
        rule = Pixels(dataset.binarization, dataset.binarization_seed, images.max_value)
        self.schema = Schema(train.shape[1:], pixels=rule)
        self.image_shape: tuple[int, ...] = train.shape[1:]
        self.max_value = images.max_value
        self.levels = images.max_value + 1
        self.encoding = ENCODINGS[dataset.binarization]
        self.options = f" --dataset.binarization {dataset.binarization}"
        self.title = f"{name}, {dataset.binarization} binarization"
        self.about = {
            "dataset": name,
            "binarization": dataset.binarization,
            "binarization_seed": dataset.binarization_seed,
        }
        self._redrawn: Binarization = "static" if dataset.binarization == "dynamic" else dataset.binarization
        redraw = dataset.binarization in ("dynamic", "dequantized")
        # Drawn on the CPU, the test set first: it is the same on every device and for every split.
        generator = torch.Generator().manual_seed(dataset.binarization_seed)
        fixed = self._redrawn
        pixels = torch.from_numpy(train).flatten(1)
        self.test = observed(torch.from_numpy(test).flatten(1), images.max_value, fixed, generator).to(device)
        self.validation = observed(pixels[-last:], images.max_value, fixed, generator).to(device)
        pixels = pixels[:-last]
        self.train_pixels = pixels.to(device)
        self._train = None if redraw else observed(pixels, images.max_value, fixed, generator).to(device)
        train_labels = _check_labels(images.train_labels, len(train), f"{name}, training labels")
        if train_labels is not None:
            self.train_labels, self.validation_labels = train_labels[:-last], train_labels[-last:]
        self.test_labels = _check_labels(images.test_labels, len(test), f"{name}, test labels")
        self.origin = images.origin
        self.fingerprint = fingerprint(train, test, images.max_value, train_labels, self.test_labels)

    @property
    def num_train(self) -> int:
        return len(self.train_pixels)

    def observe(self, index: Tensor) -> Any:
        """Training observations ``(len(index), X)``, redrawn by torch's global generator if they are noisy."""
        if self._train is not None:
            x = self._train[index]
        else:
            x = observed(self.train_pixels[index], self.max_value, self._redrawn, None)
        return x if self._condition is None else (x, self._condition[index])

    def given(self, names: Sequence[str]) -> "ImageData":
        name = self.about["dataset"]
        if list(names) != ["label"]:
            raise DataError(f"--condition {', '.join(names)}: {name} has nothing beside its images but label")
        parts: dict[str, Tensor] = {}
        for part, of in (("training", "train"), ("validation", "validation"), ("test", "test")):
            if (labels := getattr(self, f"{of}_labels")) is None:
                raise DataError(f"--condition label: the {part} images of {name} have no labels")
            parts[part] = labels
        known = parts["training"].unique()
        if not 2 <= len(known) <= MOST_CLASSES:
            raise DataError(
                f"--condition label: {name} has {len(known):,} different training labels, there must be between 2 and "
                f"{MOST_CLASSES:,}"
            )
        for part, labels in parts.items():
            if len(rows := (~torch.isin(labels, known)).nonzero()):
                row = int(rows[0])
                raise DataError(
                    f"--condition label: {part} image {row} (from 0) of {name} has the label {labels[row]}, which no "
                    "training image has"
                )
        if known.min() < 0:
            print(
                f"--condition label: the label {known.min()} of {name} is a class like the others, not an unknown one"
            )
        column = Column("label", "categorical", tuple(known.tolist()))
        train, validation, test = (
            column.encode(torch.searchsorted(known, labels)).to(self.device) for labels in parts.values()
        )
        result = copy.copy(self)
        result.schema = replace(self.schema, condition=(column,))
        result.about = {**self.about, "condition": ["label"]}
        result._condition = train
        result.validation, result.test = (self.validation, validation), (self.test, test)
        return result

    def check(self, head: Likelihood) -> None:
        levels, wanted, of = head.levels, head.encoding, f"--likelihood {type(head).__name__}"
        if wanted is not None and self.encoding != wanted:
            mend = next(setting for setting, encoding in ENCODINGS.items() if encoding == wanted)
            raise DataError(
                f"{of} scores {wanted} pixels, but{self.options} makes {self.encoding} pixels: choose "
                f"--dataset.binarization {mend}, or another likelihood"
            )
        if wanted == "integers" and levels is not None and levels != self.levels:
            raise DataError(
                f"{of} has {levels} levels, but the pixels of {self.about['dataset']} have {self.levels}: "
                f"add --likelihood.levels {self.levels}"
            )

    def picture(self, x: Tensor) -> Tensor:
        """Observations, or their means, as intensities from 0 to 1."""
        return x / self.max_value if self.encoding == "integers" else x


def observed(pixels: Tensor, max_value: int, binarization: Binarization, generator: torch.Generator | None) -> Tensor:
    """Pixels from 0 to ``max_value`` as observations; noise is drawn by ``generator``, None: torch's global one.

    Raises:
        DataError: if the rule needs whole numbers, and pixels are none.
    """
    if binarization == "none":
        return pixels.float() / max_value
    if binarization == "integers":
        if pixels.is_floating_point():
            raise DataError("real-valued pixels have no integers: save the images as whole numbers")
        return pixels.float()
    if binarization == "dequantized":
        if pixels.is_floating_point():
            pixels = pixels / max_value
        else:
            noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
            pixels = (pixels + noise) / (max_value + 1)
        return pixels.clamp(1e-6, 1 - 1e-6)  # inside the support of every density on (0, 1), after rounding too
    if binarization == "threshold":
        return (pixels > max_value / 2).float()
    if pixels.is_floating_point():
        noise = max_value * torch.rand(pixels.shape, generator=generator, device=pixels.device)
    else:  # noise in 0 .. max - 1, so that P(pixel > noise) = pixel / max exactly, at half the cost of floats
        noise = _whole_numbers(pixels.shape, max_value, generator, pixels.device)
    return (pixels > noise).float()


def _whole_numbers(shape: torch.Size, below: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draws from 0 .. below - 1, of the type that pixels have."""
    if below != 255 or generator is not None or device.type != "cpu":
        kind = torch.uint8 if below <= 255 else torch.int32
        return torch.randint(below, shape, generator=generator, dtype=kind, device=device)
    # one draw makes eight bytes, in a sixth of the time; bytes that are 255 are drawn again
    size = shape.numel()
    noise = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)[:size]
    again = (noise == 255).nonzero().squeeze(1)
    noise[again] = torch.randint(255, again.shape, dtype=torch.uint8)
    return noise.view(shape)


def _check_pixels(images: np.ndarray, max_value: int, what: str) -> np.ndarray:
    """Pixels as ``(N, C, H, W)`` from 0 to ``max_value``: uint8, int32 where that is above 255, or float32."""
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
    if not 0 < max_value <= MOST:
        raise DataError(f"{what}: the largest value must be in 1..{MOST:,}, it is {max_value}")
    if images.min() < 0 or images.max() > max_value:
        raise DataError(f"{what}: pixels must be in 0..{max_value}, they are in {images.min()}..{images.max()}")
    if np.issubdtype(images.dtype, np.floating):
        return images.astype(np.float32)
    return images.astype(np.uint8 if max_value <= 255 else np.int32)


def fingerprint(*content: Any) -> str:
    """A short hash of arrays, tensors and plain values, of what they hold and not of how it is stored."""
    known = hashlib.sha256()
    for each in content:
        if isinstance(each, Tensor):
            each = each.cpu().numpy()
        if isinstance(each, np.ndarray):
            known.update(f"{each.dtype.str} {each.shape}".encode())
            known.update(np.ascontiguousarray(each).data)
        else:
            known.update(repr(each).encode())
    return known.hexdigest()[:16]


def _check_labels(labels: np.ndarray | None, size: int, what: str) -> Tensor | None:
    if labels is None:
        return None
    whole = labels.dtype.kind in "iu" or (
        labels.dtype.kind == "f" and (np.isfinite(labels) & (labels == labels.round())).all()
    )
    if labels.shape != (size,) or not whole:
        words = labels.dtype.kind in "OSU"
        mend = "; those of words are np.unique(labels, return_inverse=True)[1]" if words else ""
        raise DataError(f"{what}: expected {size} whole numbers, got {labels.dtype} of shape {labels.shape}{mend}")
    return torch.as_tensor(labels.astype(np.int64))


def shuffled(seed: int, images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and their labels in an order that depends on the seed and their number alone."""
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order], None if labels is None else labels[order]
