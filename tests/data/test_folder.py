"""Folders of images: decoding, cache, and what is refused."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfkt.data import folder
from dfkt.errors import DataError
from dfkt.data.folder import decode_image, find_splits, read_folder


def write_image(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder with train/ and test/, two classes, 3 and 1 images each."""
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "pets" / split / name / f"{i}.png", seed=i)
    return tmp_path / "pets"


def read_in_process(args: tuple[Path, Path]) -> int:
    return int(read_folder(*args)[1]["train"][0].sum())


def test_images_and_labels_come_back_as_written(pets: Path, tmp_path: Path) -> None:
    classes, splits, notes = read_folder(pets, tmp_path / "cache", test=True)
    images, labels = splits["train"]
    assert classes == ("cat", "dog")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(images[4], np.asarray(Image.open(pets / "train/dog/1.png")))
    assert splits["test"][0].shape == (2, 8, 8, 3)
    assert str(tmp_path / "cache") in notes[0]


def test_test_images_are_not_opened_unless_asked_for(pets: Path, tmp_path: Path) -> None:
    (pets / "test/cat/0.png").write_bytes(b"broken")
    assert set(read_folder(pets, tmp_path / "cache")[1]) == {"train"}
    with pytest.raises(DataError, match=r"test/cat/0\.png"):
        read_folder(pets, tmp_path / "cache", test=True)


def test_a_second_reading_decodes_nothing(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_folder(pets, tmp_path / "cache")[1]["train"][0]
    monkeypatch.setattr(folder, "decode_all", lambda *_, **__: pytest.fail("decoded again"))
    assert np.array_equal(first, read_folder(pets, tmp_path / "cache")[1]["train"][0])
    pets.rename(tmp_path / "moved")
    assert np.array_equal(first, read_folder(tmp_path / "moved", tmp_path / "cache")[1]["train"][0])


def test_a_changed_file_is_decoded_again(pets: Path, tmp_path: Path) -> None:
    before = read_folder(pets, tmp_path / "cache")[1]["train"][0]
    write_image(pets / "train/cat/0.png", seed=99)
    os.utime(pets / "train/cat/0.png", ns=(1, 1))
    after = read_folder(pets, tmp_path / "cache")[1]["train"][0]
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1:], after[1:])


@pytest.mark.parametrize("damage", [b"", b"not numpy", None])
def test_a_damaged_cache_is_decoded_again(pets: Path, tmp_path: Path, damage: bytes | None) -> None:
    before = read_folder(pets, tmp_path / "cache")[1]["train"][0]
    (kept,) = (tmp_path / "cache").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-5] if damage is None else damage)
    assert np.array_equal(before, read_folder(pets, tmp_path / "cache")[1]["train"][0])
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
    splits = read_folder(tmp_path / "grey", tmp_path / "cache", test=True)[1]
    assert splits["train"][0].shape == splits["test"][0].shape == (2, 8, 8, 1)


def test_one_colour_image_makes_three_channels(tmp_path: Path) -> None:
    write_image(tmp_path / "mixed/a/0.png", mode="L")
    write_image(tmp_path / "mixed/b/0.png", mode="RGB")
    images = read_folder(tmp_path / "mixed", tmp_path / "cache")[1]["train"][0]
    assert images.shape == (2, 8, 8, 3)
    assert (images[0, ..., 0] == images[0, ..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "YCbCr"])
def test_other_modes_become_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.png" if mode in ("RGBA", "P") else "x.jpg")
    write_image(path, mode=mode)
    assert decode_image(path, size=8).shape == (8, 8, 3)


def test_a_transparent_palette_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    assert decode_image(tmp_path / "x.png", size=8)[0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", size=8)[0, 0].tolist() == [0x80]


def test_the_first_image_sets_the_size_and_others_are_cropped(tmp_path: Path) -> None:
    write_image(tmp_path / "sizes/a/0.png", size=(12, 6))
    write_image(tmp_path / "sizes/b/0.png", size=(20, 20))
    images = read_folder(tmp_path / "sizes", tmp_path / "cache")[1]["train"][0]
    assert images.shape == (2, 6, 6, 3)
    assert np.array_equal(images[0], np.asarray(Image.open(tmp_path / "sizes/a/0.png"))[:, 3:9])
    assert read_folder(tmp_path / "sizes", tmp_path / "cache", size=4)[1]["train"][0].shape == (2, 4, 4, 3)


def test_images_are_found_in_deeper_folders_and_other_files_ignored(tmp_path: Path) -> None:
    write_image(tmp_path / "deep/a/images/0.PNG")
    write_image(tmp_path / "deep/b/0.png")
    (tmp_path / "deep/b/boxes.txt").write_text("x")
    (tmp_path / "deep/.hidden").mkdir()
    assert read_folder(tmp_path / "deep", tmp_path / "cache")[1]["train"][1].tolist() == [0, 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "train"):
        write_image(tmp_path / "vehicles" / name / "0.png")
    assert read_folder(tmp_path / "vehicles", tmp_path / "cache")[0] == ("car", "train")


def test_val_is_read_where_there_is_one(pets: Path, tmp_path: Path) -> None:
    write_image(pets / "val/dog/0.png")
    assert set(find_splits(pets)) == {"train", "val", "test"}
    assert read_folder(pets, tmp_path / "cache")[1]["val"][1].tolist() == [1]


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
