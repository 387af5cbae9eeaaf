"""Sets known by name, from small files in their own formats."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from known_sets import cut_off, pixels, write_cifar, write_mnist
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets import mnist

from dfkt.config import DataConfig
from dfkt.data.load import load_data, load_test
from dfkt.data.named import read_known, read_known_test
from dfkt.errors import DataError


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files pass torchvision's checksums, and nothing is downloaded."""

    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    cut_off(monkeypatch, fail)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_with_channels_last(tmp_path: Path, name: str, classes: int) -> None:
    if name == "cifar10":
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        write_cifar(tmp_path / "cifar-10-batches-py", files, ("batches.meta", "label_names"), "labels", classes)
    else:
        names = ("meta", "fine_label_names")
        write_cifar(tmp_path / "cifar-100-python", ["train", "test"], names, "fine_labels", classes)
    test = read_known_test(name, tmp_path)
    assert test is not None
    expected = pixels(2 * classes, 3072).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(test[0], expected)
    assert read_known(name, tmp_path).train[1][:classes].tolist() == list(range(classes))
    data = load_data(DataConfig(name=name), tmp_path)
    assert (data.num_classes, data.channels, data.image_size) == (classes, 3, (32, 32))
    assert (data.padding, data.flip) == (4, True)
    assert data.classes[1] == "class 1"


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_also_where_it_is_still_packed(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", packed=packed)
    data = load_data(DataConfig(name="mnist"), tmp_path)
    test = load_test(DataConfig(name="mnist"), tmp_path, like=data)
    assert (len(data.train), len(data.val), len(test)) == (30, 10, 20)
    assert (data.title, data.channels, data.image_size, data.padding, data.flip) == ("MNIST", 1, (28, 28), 2, False)
    assert np.array_equal(test.images[..., 0], pixels(20, 28, 28))


def test_several_may_unpack_mnist_at_once(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", packed=True)
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: read_known("mnist", tmp_path), range(4)))
    assert all(np.array_equal(s.train[0], sources[0].train[0]) for s in sources)
    assert not list(tmp_path.rglob("*.part"))


def test_svhn_is_read_with_its_tens_as_zeros(tmp_path: Path) -> None:
    images, labels = pixels(40, 32, 32, 3), np.arange(40) % 10 + 1
    savemat(tmp_path / "train_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)})
    source = read_known("svhn", tmp_path)
    assert np.array_equal(source.train[0], images)
    assert source.train[1][:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    data = load_data(DataConfig(name="svhn", image_size=16), tmp_path)
    assert (data.title, data.image_size, data.padding, data.flip) == ("SVHN", (16, 16), 4, False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "svhn"])
def test_what_cannot_be_downloaded_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"nor downloaded \(.*--data FOLDER, or --data digits") as caught:
        read_known(name, tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_of_several_at_once_one_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def download(self: Any) -> None:
        if not self._check_exists():
            downloads.append(1)
            write_mnist(tmp_path / "MNIST" / "raw", packed=False)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: read_known("mnist", tmp_path), range(3)))
    assert downloads == [1]


def test_training_opens_no_test_image_and_testing_no_training_image(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, packed=False)
    opened: list[str] = []
    read = mnist.read_image_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "read_image_file", lambda path: (opened.append(Path(path).name), read(path))[1])
        data = load_data(DataConfig(name="mnist"), tmp_path)
        assert opened == ["train-images-idx3-ubyte"]
        load_test(DataConfig(name="mnist"), tmp_path, like=data)
        assert opened[1:] == ["t10k-images-idx3-ubyte"]


def test_digits_have_no_test_images_of_their_own(tmp_path: Path) -> None:
    assert read_known_test("digits", tmp_path) is None
    assert not read_known("digits", tmp_path).owns_test


def test_damaged_files_are_reported_in_one_line(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", packed=False)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x05" * 3)
    with pytest.raises(DataError, match="MNIST could be neither read"):
        read_known("mnist", tmp_path)
