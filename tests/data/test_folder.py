"""Folders of images: decoding, cache, and what is refused."""

import errno
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import write_image
from numpy.typing import NDArray
from PIL import Image

from dfkt.data import folder
from dfkt.data.folder import read_folder, read_folder_test
from dfkt.data.listing import find_splits
from dfkt.data.source import Arrays
from dfkt.errors import DataError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder with train/ and test/, two classes, 3 and 1 images each."""
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "pets" / split / name / f"{i}.png", seed=i)
    return tmp_path / "pets"


def train_of(folder: Path, tmp_path: Path, size: int | None = None) -> NDArray[np.uint8]:
    """The training images; copied, because a mapped file changes with the file."""
    return read_folder(folder, tmp_path / "cache", size=size).train[0].copy()


def read_test(folder: Path, tmp_path: Path) -> Arrays:
    arrays = read_folder_test(folder, tmp_path / "cache", ("cat", "dog"), size=8, channels=3)
    assert arrays is not None
    return arrays


def read_in_process(args: tuple[Path, Path]) -> int:
    return int(read_folder(*args).train[0].sum())


def test_images_and_labels_come_back_as_written(pets: Path, tmp_path: Path) -> None:
    source = read_folder(pets, tmp_path / "cache")
    images, labels = source.train
    assert (source.classes, source.val, source.owns_test) == (("cat", "dog"), None, True)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(images[4], np.asarray(Image.open(pets / "train/dog/1.png")))
    assert len(source.notes) == 1
    assert str(tmp_path / "cache") in source.notes[0]


def test_test_images_are_not_opened_unless_asked_for(pets: Path, tmp_path: Path) -> None:
    images, labels = read_test(pets, tmp_path)
    assert images.shape == (2, 8, 8, 3)
    assert labels.tolist() == [0, 1]
    (pets / "test/cat/0.png").write_bytes(b"broken")
    read_folder(pets, tmp_path / "cache")
    with pytest.raises(DataError, match=r"test/cat/0\.png"):
        read_test(pets, tmp_path)


def test_a_folder_without_test_has_no_test_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_image(tmp_path / "pets" / name / "0.png")
    assert read_folder_test(tmp_path / "pets", tmp_path / "cache", ("cat", "dog"), size=8, channels=3) is None
    assert not read_folder(tmp_path / "pets", tmp_path / "cache").owns_test


@pytest.mark.parametrize(
    ("name", "message"),
    [("fish", "must be in train/ too, but got fish"), (None, "The test split must hold images")],
)
def test_a_test_folder_that_does_not_fit_is_refused(pets: Path, tmp_path: Path, name: str | None, message: str) -> None:
    for image in pets.glob("test/*/0.png"):
        image.unlink()
    if name:
        write_image(pets / "test" / name / "0.png")
    with pytest.raises(DataError, match=message):
        read_test(pets, tmp_path)


def test_images_are_mapped_from_the_cache_not_read(pets: Path, tmp_path: Path) -> None:
    decoded, kept = (read_folder(pets, tmp_path / "cache").train[0] for _ in range(2))
    for images in (decoded, kept):  # the first reading gives its decoded copy up as well
        assert isinstance(images.base, np.memmap)
        assert not images.flags.writeable


def test_a_file_system_that_cannot_map_files_is_read(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_of(pets, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(np, "memmap", refuse)
    monkeypatch.setattr(np.lib.format, "open_memmap", refuse)
    monkeypatch.setattr(folder, "decode_all", lambda *_, **__: pytest.fail("decoded again"))
    assert np.array_equal(first, train_of(pets, tmp_path))


def test_a_second_reading_decodes_nothing(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_of(pets, tmp_path)
    monkeypatch.setattr(folder, "decode_all", lambda *_, **__: pytest.fail("decoded again"))
    assert np.array_equal(first, train_of(pets, tmp_path))
    pets.rename(tmp_path / "moved")
    assert np.array_equal(first, train_of(tmp_path / "moved", tmp_path))


def test_a_changed_file_is_decoded_again(pets: Path, tmp_path: Path) -> None:
    before = train_of(pets, tmp_path)
    write_image(pets / "train/cat/0.png", seed=99)
    os.utime(pets / "train/cat/0.png", ns=(1, 1))
    after = train_of(pets, tmp_path)
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1:], after[1:])


@pytest.mark.parametrize("damage", [b"", b"not numpy", None])
def test_a_damaged_cache_is_decoded_again(pets: Path, tmp_path: Path, damage: bytes | None) -> None:
    before = train_of(pets, tmp_path)
    (kept,) = (tmp_path / "cache").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-5] if damage is None else damage)
    assert np.array_equal(before, train_of(pets, tmp_path))
    assert np.array_equal(before, np.load(kept))


def test_of_several_at_once_one_decodes(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode = [], folder.decode_all
    monkeypatch.setattr(folder, "decode_all", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(read_in_process, [(pets, tmp_path / "cache")] * 4))
    assert len(set(sums)) == 1
    assert len(calls) == 1


@pytest.mark.slow
def test_two_processes_at_once_agree(pets: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        sums = list(pool.map(read_in_process, [(pets, tmp_path / "cache")] * 2))
    assert len(set(sums)) == 1
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_images_have_one_channel_and_test_follows_train(tmp_path: Path, mode: str) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / "grey/train" / name / "0.png", mode=mode)
        write_image(tmp_path / "grey/test" / name / "0.png", mode="RGB")
    test = read_folder_test(tmp_path / "grey", tmp_path / "cache", ("a", "b"), size=8, channels=1)
    assert test is not None
    assert train_of(tmp_path / "grey", tmp_path).shape == test[0].shape == (2, 8, 8, 1)


def test_the_first_image_sets_the_size_and_others_are_cropped(tmp_path: Path) -> None:
    write_image(tmp_path / "sizes/a/0.png", size=(12, 6))
    write_image(tmp_path / "sizes/b/0.png", size=(20, 20))
    images = train_of(tmp_path / "sizes", tmp_path)
    assert images.shape == (2, 6, 6, 3)
    assert np.array_equal(images[0], np.asarray(Image.open(tmp_path / "sizes/a/0.png"))[:, 3:9])
    assert train_of(tmp_path / "sizes", tmp_path, size=4).shape == (2, 4, 4, 3)


def test_images_are_found_in_deeper_folders_and_other_files_ignored(tmp_path: Path) -> None:
    write_image(tmp_path / "deep/a/images/0.PNG")
    write_image(tmp_path / "deep/b/0.png")
    (tmp_path / "deep/b/boxes.txt").write_text("x")
    (tmp_path / "deep/.hidden").mkdir()
    assert read_folder(tmp_path / "deep", tmp_path / "cache").train[1].tolist() == [0, 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "train"):
        write_image(tmp_path / "vehicles" / name / "0.png")
    assert read_folder(tmp_path / "vehicles", tmp_path / "cache").classes == ("car", "train")


def test_val_is_read_where_there_is_one(pets: Path, tmp_path: Path) -> None:
    write_image(pets / "val/dog/0.png")
    assert set(find_splits(pets)) == {"train", "val", "test"}
    source = read_folder(pets, tmp_path / "cache")
    assert source.val is not None
    assert source.val[1].tolist() == [1]
    assert all(path.name in source.notes[-1] for path in (tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize(
    ("empty", "message"),
    [
        ("train/bird", "Every class must have training images, but bird has none"),
        ("test/fish", "must be in train/ too, but got fish"),
        ("val", "The val split must hold images"),
    ],
)
def test_empty_and_unknown_classes_are_named(pets: Path, tmp_path: Path, empty: str, message: str) -> None:
    (pets / empty).mkdir()
    with pytest.raises(DataError, match=message):
        read_folder(pets, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("0.png", "two or more classes, but has none"),
        ("cat/0.png", "two or more classes, but has only 'cat'"),
        ("train/0.png", "two or more classes, but has none"),
        ("test/cat/0.png", "must hold train/ beside it"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path: Path, image: str, message: str) -> None:
    write_image(tmp_path / "odd" / image)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path / "odd", tmp_path / "cache")


def test_a_broken_image_is_named(pets: Path, tmp_path: Path) -> None:
    whole = (pets / "train/dog/2.png").read_bytes()
    for broken in (b"", b"text", whole[: len(whole) // 2]):
        (pets / "train/dog/2.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"train/dog/2\.png is not"):
            read_folder(pets, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_cache_that_cannot_be_written_is_named(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data root must be writable"):
        read_folder(pets, tmp_path / "file" / "cache")
