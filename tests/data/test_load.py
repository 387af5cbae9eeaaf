"""Image sets: reading, splitting, augmentation."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dfkt.config import DataConfig
from dfkt.data.load import ImageSet, Split, _augment, _check_labels, eval_batches, load_data, steps_per_epoch, train_batches
from dfkt.errors import DataError


def toy(count: int = 20, size: int = 6, channels: int = 3, padding: int = 2, flip: bool = True) -> ImageSet:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, channels), generator=random, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % 4)
    mean, std = torch.full((channels,), 0.4), torch.linspace(0.2, 0.3, channels)
    return ImageSet("toy", "toy", tuple("abcd"), split, split, None, mean, std, padding, flip)


def restore(data: ImageSet, images: Tensor) -> Tensor:
    """Undo the normalisation: float ``[B, C, H, W]`` back to uint8 ``[B, H, W, C]``."""
    return ((images.permute(0, 2, 3, 1) * data.std + data.mean) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("channels", "padding", "flip"), [(3, 2, True), (1, 1, False), (3, 0, True)])
def test_augmentation_agrees_with_a_loop_over_images(channels: int, padding: int, flip: bool) -> None:
    data = toy(channels=channels, padding=padding)
    chosen = torch.tensor([0, 19, 19, 7, 3])
    top, left = torch.randint(2 * padding + 1, (2, 5), generator=torch.Generator().manual_seed(1))
    top[1], left[1] = 2 * padding, 2 * padding  # the last image's last corner
    flips = torch.tensor([True, False, True, True, False]) & flip
    got = _augment(data._padded, data.image_size, chosen, top, left, flips)
    for b in range(5):
        padded = np.pad(data.train.images[chosen[b]].numpy(), ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[top[b] : top[b] + 6, left[b] : left[b] + 6]
        assert np.array_equal(got[b].numpy(), crop[:, ::-1] if flips[b] else crop)


def test_without_augmentation_an_epoch_is_a_permutation() -> None:
    data = toy(padding=0, flip=False)
    images, labels = next(train_batches(data, 20, seed=0, epoch=0))
    order = [int((data.train.images == image).flatten(1).all(1).nonzero()) for image in restore(data, images)]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)
    assert torch.equal(labels, data.train.labels[order])


def test_every_offset_and_both_flips_occur() -> None:
    data = toy(count=2000, size=2, padding=1)
    plain = dataclasses.replace(data, flip=False)
    batches = [next(train_batches(d, 2000, seed=0, epoch=0))[0] for d in (data, plain)]
    share = (batches[0] != batches[1]).flatten(1).any(1).float().mean()
    assert 0.4 < share < 0.55  # a few crops are black, and look the same flipped
    assert torch.equal(batches[0].sum(3), batches[0].flip(3).sum(3))


def test_batches_depend_on_seed_and_epoch_only() -> None:
    def first(seed: int, epoch: int) -> Tensor:
        return next(train_batches(toy(), 8, seed=seed, epoch=epoch))[0]

    torch.manual_seed(1)
    one = first(3, 5)
    torch.manual_seed(2)
    assert torch.equal(one, first(3, 5))
    assert not torch.equal(one, first(3, 6))
    assert not torch.equal(one, first(5, 3))


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_batches_of_one(world: int) -> None:
    whole = list(train_batches(toy(), 8, seed=0, epoch=0))
    for rank in range(world):
        parts = train_batches(toy(), 8, seed=0, epoch=0, rank=rank, world=world)
        for (images, labels), (part, part_labels) in zip(whole, parts, strict=True):
            assert torch.equal(images[rank::world], part)
            assert torch.equal(labels[rank::world], part_labels)


@pytest.mark.parametrize(("batch_size", "steps"), [(20, 1), (8, 2), (7, 2), (500, 1), (1, 20)])
def test_an_epoch_has_full_batches_only(batch_size: int, steps: int) -> None:
    sizes = [len(labels) for _, labels in train_batches(toy(), batch_size, seed=0, epoch=0)]
    assert sizes == [min(batch_size, 20)] * steps
    assert steps_per_epoch(toy(), batch_size) == steps


def test_batches_are_channels_last_floats() -> None:
    images, labels = next(train_batches(toy(), 8, seed=0, epoch=0))
    assert images.shape == (8, 3, 6, 6)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_eval_batches_are_the_whole_split_in_order() -> None:
    data = toy()
    batches = list(eval_batches(data, data.val, 8))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    images = torch.cat([images for images, _ in batches])
    expected = (data.val.images / 255 - data.mean) / data.std
    torch.testing.assert_close(images, expected.permute(0, 3, 1, 2))


def test_mean_and_std_normalise_the_training_split() -> None:
    data = load_data(DataConfig())
    images = torch.cat([images for images, _ in eval_batches(data, data.train, 500)])
    assert abs(images.mean()) < 1e-4
    assert abs(images.std(correction=0) - 1) < 1e-4


def test_digits_are_split_by_class_without_overlap() -> None:
    data = load_data(DataConfig(), test=True)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1293, 145, 359)
    assert (data.num_classes, data.channels, data.image_size, data.padding, data.flip) == (10, 1, (8, 8), 1, False)
    whole = torch.cat([s.images for s in (data.train, data.val, data.test)]).flatten(1).double()
    marks = whole @ torch.arange(1, 65).double().sqrt()  # one number per image; the set holds no image twice
    assert len(marks.unique()) == 1797
    for split in (data.train, data.val, data.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.01


def test_the_test_split_does_not_depend_on_settings() -> None:
    one = load_data(DataConfig(split_seed=0), test=True)
    two = load_data(DataConfig(split_seed=1, val_fraction=0.3, limit_train=500), test=True)
    assert one.test is not None
    assert two.test is not None
    assert torch.equal(one.test.images, two.test.images)
    assert not torch.equal(one.val.images[:50], two.val.images[:50])
    assert load_data(DataConfig()).test is None


def test_limits_hold_and_keep_the_shares_of_the_classes() -> None:
    data = load_data(DataConfig(limit_train=205, limit_test=33), test=True)
    assert data.test is not None
    assert len(data.train) + len(data.val) == 205
    assert len(data.test) == 33
    assert torch.bincount(data.train.labels).aminmax().min >= 17
    assert len(load_data(DataConfig(limit_train=10**6)).train) == 1293


def test_too_few_images_to_split_name_the_class() -> None:
    with pytest.raises(DataError, match="2 images or more to be split, but class 8 has 1"):
        load_data(DataConfig(limit_train=19))


def test_every_class_is_in_val_and_in_train() -> None:
    for fraction in (0.001, 0.999):
        data = load_data(DataConfig(limit_train=40, val_fraction=fraction))
        assert len(data.train.labels.unique()) == len(data.val.labels.unique()) == 10


def test_settings_override_the_defaults_of_the_set() -> None:
    data = load_data(DataConfig(padding=3, flip=True, image_size=12))
    assert (data.padding, data.flip, data.image_size) == (3, True, (12, 12))
    assert data.train.images.dtype == torch.uint8
    assert next(train_batches(data, 4, seed=0, epoch=0))[0].shape == (4, 1, 12, 12)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"cifar10, cifar100, mnist, svhn, digits, or an existing folder, but got 'x'"):
        load_data(DataConfig(name="x"))


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=f"label={label}"):
        _check_labels(torch.tensor([0, label, 9]), 10)


def test_a_set_moves_as_a_whole() -> None:
    data = load_data(DataConfig(), test=True).to("meta")
    assert data.test is not None
    tensors = (data.train.images, data.val.labels, data.test.images, data.mean, data.std)
    assert all(tensor.is_meta for tensor in tensors)


def test_a_folder_without_test_gives_a_fifth_and_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "shapes" / name / f"{i}.png")
    data = load_data(DataConfig(name=str(tmp_path / "shapes"), root=str(tmp_path)), test=True)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
    assert (data.title, data.padding, data.flip) == ("shapes", 2, True)
    assert any("no test/ folder" in note for note in data.notes)
    reds = [split.images[split.labels == 0, 0, 0, 0] for split in (data.train, data.val, data.test)]
    assert torch.cat(reds).unique().tolist() == list(range(10))


@pytest.mark.data
@pytest.mark.skipif("DFKT_DATA" not in os.environ, reason="DFKT_DATA names no folder of image sets")
@pytest.mark.timeout(300)
def test_real_sets_are_read(tmp_path: Path) -> None:
    place = Path(os.environ["DFKT_DATA"])
    shutil.copytree(place / "MNIST", tmp_path / "MNIST")
    mnist = load_data(DataConfig(name="mnist", root=str(tmp_path)), test=True)
    assert mnist.test is not None
    assert (len(mnist.train), len(mnist.val), len(mnist.test)) == (54000, 6000, 10000)
    assert mnist.mean.item() == pytest.approx(0.1307, abs=1e-3)
    cifar = load_data(DataConfig(name=str(place / "cifar10-jpeg"), root=str(tmp_path)), test=True)
    assert cifar.test is not None
    assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (45000, 5000, 10000)
    torch.testing.assert_close(cifar.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3, rtol=0)
