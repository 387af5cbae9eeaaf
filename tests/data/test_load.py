"""Reading and splitting: which images are in train, val and test, and what a reading costs."""

import os
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_image
from PIL import Image

from dfkt.config import DataConfig
from dfkt.data import load
from dfkt.data.batches import train_batches
from dfkt.data.image_set import ImageSet, Split
from dfkt.data.load import load_data, load_test
from dfkt.errors import DataError

ROOT = "unused"


def load_both(config: DataConfig, root: str | Path = ROOT) -> tuple[ImageSet, Split]:
    data = load_data(config, root)
    return data, load_test(config, root, like=data)


def checksums(*splits: Split) -> str:
    """One of images and labels of every split."""
    tensors = [(split.images.contiguous().numpy().data, split.labels.numpy().data) for split in splits]
    return " ".join(f"{zlib.crc32(labels, zlib.crc32(images)):08x}" for images, labels in tensors)


def test_digits_are_split_by_class_without_overlap() -> None:
    data, test = load_both(DataConfig())
    assert (len(data.train), len(data.val), len(test)) == (1293, 145, 359)
    assert (data.num_classes, data.channels, data.image_size, data.padding, data.flip) == (10, 1, (8, 8), 1, False)
    whole = torch.cat([s.images for s in (data.train, data.val, test)]).flatten(1).double()
    marks = whole @ torch.arange(1, 65).double().sqrt()  # one number per image; the set holds no image twice
    assert len(marks.unique()) == 1797
    for split in (data.train, data.val, test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.01


@pytest.mark.parametrize(
    ("limit_train", "limit_test", "seed", "fraction", "expected"),
    [
        (None, None, 0, 0.1, "e82c2864 35ee6009 66a8a090"),
        (None, 60, 0, 0.1, "e82c2864 35ee6009 fb16e778"),
        (300, 60, 0, 0.1, "f05d5085 83b9143c fb16e778"),
        (300, 60, 1, 0.1, "cdb14ccd 3f9dc871 a163f2ed"),
        (1000, 17, 7, 0.25, "4dc1995d df31f7ab 0f85818b"),
        (40, 1, 3, 0.5, "a5403977 abb24dc7 7e080cb4"),
        (5000, 5000, 2, 0.1, "2da71a74 f1738445 66a8a090"),
    ],
)
def test_splits_of_digits_hold_the_same_images_in_every_version(
    limit_train: int | None, limit_test: int | None, seed: int, fraction: float, expected: str
) -> None:
    config = DataConfig(limit_train=limit_train, limit_test=limit_test, split_seed=seed, val_fraction=fraction)
    data, test = load_both(config)
    assert checksums(data.train, data.val, test) == expected
    assert f"{data.checksum:08x}" == expected.split()[0]


@pytest.mark.parametrize(
    ("limit_train", "limit_test", "seed", "expected"),
    [(None, None, 0, "ce3f19e6 5be433ff 4cc5e3b6"), (30, 5, 1, "b777363e 8d3bc2e6 522f711f")],
)
def test_splits_of_a_folder_hold_the_same_images_in_every_version(
    tmp_path: Path, limit_train: int | None, limit_test: int | None, seed: int, expected: str
) -> None:
    draws = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        for i in range(20):
            image = draws.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            write_image(tmp_path / "zoo" / name / f"{i:02}.png", pixels=image)
    config = DataConfig(name=str(tmp_path / "zoo"), limit_train=limit_train, limit_test=limit_test, split_seed=seed)
    data, test = load_both(config, tmp_path)
    assert checksums(data.train, data.val, test) == expected


def test_the_test_split_does_not_depend_on_settings() -> None:
    one, test = load_both(DataConfig(split_seed=0))
    two, other_test = load_both(DataConfig(split_seed=1, val_fraction=0.3, limit_train=500, padding=3))
    assert torch.equal(test.images, other_test.images)
    assert not torch.equal(one.val.images[:50], two.val.images[:50])


def test_limits_hold_and_keep_the_shares_of_the_classes() -> None:
    data, test = load_both(DataConfig(limit_train=205, limit_test=33))
    assert len(data.train) + len(data.val) == 205
    assert len(test) == 33
    assert torch.bincount(data.train.labels).aminmax().min >= 17
    assert torch.bincount(test.labels).aminmax().min >= 3
    assert len(load_data(DataConfig(limit_train=10**6), ROOT).train) == 1293


def test_too_few_images_to_split_name_the_class() -> None:
    with pytest.raises(DataError, match="2 images or more to be split, but class 8 has 1"):
        load_data(DataConfig(limit_train=19), ROOT)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_every_class_is_in_val_and_in_train(fraction: float) -> None:
    data = load_data(DataConfig(limit_train=40, val_fraction=fraction), ROOT)
    assert len(data.train.labels.unique()) == len(data.val.labels.unique()) == 10


def test_settings_override_the_defaults_of_the_set() -> None:
    data = load_data(DataConfig(padding=3, flip=True, image_size=12), ROOT)
    assert (data.padding, data.flip, data.image_size) == (3, True, (12, 12))
    assert data.padded.images.shape == (1293, 18, 18, 1)
    assert data.train.images.dtype == torch.uint8
    assert next(train_batches(data, 4, seed=0, epoch=0))[0].shape == (4, 1, 12, 12)


def test_every_split_is_resized_alike() -> None:
    small, test = load_both(DataConfig(image_size=4))
    whole, whole_test = load_both(DataConfig())
    for split, source in ((small.train, whole.train), (small.val, whole.val), (test, whole_test)):
        assert split.images.shape == (len(source), 4, 4, 1)
        assert torch.equal(split.labels, source.labels)
        planes = source.images.permute(0, 3, 1, 2).float()
        shrunk = F.interpolate(planes, size=(4, 4), mode="bilinear", antialias=True)
        assert torch.equal(split.images[..., 0], shrunk[:, 0].round().to(torch.uint8))


def test_a_resized_image_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_data(DataConfig(image_size=12), ROOT)
    monkeypatch.setattr(load, "CHUNK", 1)
    assert torch.equal(whole.train.images, load_data(DataConfig(image_size=12), ROOT).train.images)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"cifar10, cifar100, mnist, svhn, digits, or an existing folder, but got 'x'"):
        load_data(DataConfig(name="x"), ROOT)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    def read(name: str, root: Path) -> load.Source:
        arrays = np.zeros((3, 8, 8, 1), dtype=np.uint8), np.array([0, label, 9])
        return load.Source("odd", tuple("0123456789"), arrays, None, owns_test=True, padding=0, flip=False)

    monkeypatch.setattr(load, "read_known", read)
    with pytest.raises(DataError, match=rf"`0 <= label < 10` must hold, but got label={label}"):
        load_data(DataConfig(), ROOT)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder of two classes with 10 images each, of 10 shades of red, and no test/."""
    for name in ("a", "b"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "shapes" / name / f"{i}.png")
    return tmp_path / "shapes"


def test_a_folder_without_test_gives_a_fifth_and_says_so(shapes: Path, tmp_path: Path) -> None:
    data, test = load_both(DataConfig(name=str(shapes)), tmp_path)
    assert (len(data.train), len(data.val), len(test)) == (14, 2, 4)
    assert (data.title, data.padding, data.flip) == ("shapes", 2, False)
    assert any("no test/ folder" in note for note in data.notes)
    reds = [split.images[split.labels == 0, 0, 0, 0] for split in (data.train, data.val, test)]
    assert torch.cat(reds).unique().tolist() == list(range(10))


def test_the_fifth_is_read_from_the_same_cache(shapes: Path, tmp_path: Path) -> None:
    load_both(DataConfig(name=str(shapes)), tmp_path)
    assert len(list((tmp_path / "folders").glob("*.npy"))) == 1


def test_test_images_are_opened_by_load_test_alone_and_follow_the_training_images(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    shapes.rename(tmp_path / "whole/train")
    write_image(tmp_path / "whole/test/b/0.png", size=(40, 32), mode="L")
    write_image(tmp_path / "whole/test/b/1.png", size=(16, 16))
    (tmp_path / "whole/test/b/1.png").write_bytes(b"broken")
    config = DataConfig(name=str(tmp_path / "whole"))
    data = load_data(config, tmp_path)
    assert (len(data.train), len(data.val)) == (18, 2)
    with pytest.raises(DataError, match=r"test/b/1\.png is not"):
        load_test(config, tmp_path, like=data)
    (tmp_path / "whole/test/b/1.png").unlink()
    test = load_test(config, tmp_path, like=data)
    assert test.images.shape == (1, 16, 16, 3)
    assert test.labels.tolist() == [1]


def test_the_val_folder_is_val_and_nothing_is_held_out_of_train(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    shapes.rename(tmp_path / "whole/train")
    for split, seed in (("val", 1), ("test", 2)):
        write_image(tmp_path / "whole" / split / "a/0.png", size=(16, 16), seed=seed)
    data, test = load_both(DataConfig(name=str(tmp_path / "whole"), limit_train=12), tmp_path)
    assert (len(data.train), len(data.val), len(test)) == (12, 1, 1)
    assert np.array_equal(data.val.images[0], np.asarray(Image.open(tmp_path / "whole/val/a/0.png")))
    assert not torch.equal(data.val.images, test.images)


def test_a_kept_folder_is_copied_once_and_no_more_of_it_than_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(80):
        write_image(tmp_path / "noise" / "ab"[i % 2] / f"{i}.png", size=(64, 64), seed=i)
    monkeypatch.setattr(load, "CHUNK", 4)
    monkeypatch.setattr(load, "channel_moments", lambda images: (torch.zeros(3), torch.ones(3)))  # a fixed cost
    for limit in (None, 40):  # the first limit decodes
        config = DataConfig(name=str(tmp_path / "noise"), padding=2, limit_train=limit)
        load_data(config, tmp_path)
        tracemalloc.start()
        data = load_data(config, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        held = data.padded.images.nbytes + data.val.images.nbytes
        assert held < peak < 1.3 * held


@pytest.mark.data
@pytest.mark.skipif("DFKT_DATA" not in os.environ, reason="DFKT_DATA names no folder of image sets")
@pytest.mark.timeout(300)
def test_real_sets_are_read(tmp_path: Path) -> None:
    place = Path(os.environ["DFKT_DATA"])
    shutil.copytree(place / "MNIST", tmp_path / "MNIST")
    mnist, test = load_both(DataConfig(name="mnist"), tmp_path)
    assert (len(mnist.train), len(mnist.val), len(test)) == (54000, 6000, 10000)
    assert mnist.mean.item() == pytest.approx(0.1307, abs=1e-3)
    cifar, test = load_both(DataConfig(name=str(place / "cifar10-jpeg")), tmp_path)
    assert (len(cifar.train), len(cifar.val), len(test)) == (45000, 5000, 10000)
    torch.testing.assert_close(cifar.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3, rtol=0)
