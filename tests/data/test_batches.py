"""Batches: order, crops and flips, shared among workers."""

import dataclasses
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import synthetic_images, write_image
from torch import Tensor

from dfkt.config import DataConfig
from dfkt.data.batches import eval_batches, random_areas, random_crops, random_flips, steps_per_epoch, train_batches
from dfkt.data.image_set import ImageSet
from dfkt.data.load import load_data


def toy(count: int = 20, size: int = 6, channels: int = 3, padding: int = 2, flip: bool = True) -> ImageSet:
    data = synthetic_images(size, channels, count=count, padding=padding, flip=flip)
    return dataclasses.replace(data, std=torch.linspace(0.2, 0.3, channels))


def restore(data: ImageSet, images: Tensor) -> Tensor:
    """Undo the normalisation: float ``[B, C, H, W]`` back to uint8 ``[B, H, W, C]``."""
    return ((images.permute(0, 2, 3, 1) * data.std + data.mean) * 255).round().to(torch.uint8)


def checksum(batches: Iterable[tuple[Tensor, Tensor]]) -> str:
    value = 0
    for images, labels in batches:
        value = zlib.crc32(images.permute(0, 2, 3, 1).contiguous().numpy().data, value)
        value = zlib.crc32(labels.numpy().data, value)
    return f"{value:08x}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSet]:
    """Digits and a folder of colour images, each as it comes and with other augmentation."""
    root = tmp_path_factory.mktemp("zoo")
    draws = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        for i in range(20):
            image = draws.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            write_image(root / "zoo" / name / f"{i:02}.png", pixels=image)
    zoo = str(root / "zoo")
    return {
        "digits": load_data(DataConfig(limit_train=300), root),
        "digits, flipped": load_data(DataConfig(limit_train=300, padding=2, flip=True), root),
        "zoo": load_data(DataConfig(name=zoo, flip=True), root),
        "zoo, plain": load_data(DataConfig(name=zoo, padding=0, flip=False), root),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "a860d5d9 2cf61f31 e57ed0ac 92b53739 1b14198d"),
        ("digits, flipped", "cc473dcc 9446db9b 9311ac18 df6a94ef f81f786d"),
        ("zoo", "75652637 ffa5d97b ef24e819 31a71d13 7d58335f"),
        ("zoo, plain", "9b5c5c4c f7ff34ca 03cb04a9 f9d6ce33 de8bb572"),
    ],
)
def test_augmented_batches_are_the_same_to_the_last_bit_in_every_version(
    sets: dict[str, ImageSet], name: str, expected: str
) -> None:
    data = sets[name]
    epochs = [
        train_batches(data, 16, seed=0, epoch=0),
        train_batches(data, 16, seed=0, epoch=1),
        train_batches(data, 16, seed=3, epoch=7, start=1, rank=0, world=2),
        train_batches(data, 16, seed=3, epoch=7, start=1, rank=1, world=2),
        train_batches(data, 10, seed=1, epoch=2, rank=2, world=3),
    ]
    assert [checksum(batches) for batches in epochs] == expected.split()


@pytest.mark.parametrize(
    ("name", "val", "train"), [("digits", "4d8bc4fe", "8469bfb3"), ("zoo", "7004386a", "ae7804c0")]
)
def test_normalised_splits_are_the_same_to_the_last_bit_in_every_version(
    sets: dict[str, ImageSet], name: str, val: str, train: str
) -> None:
    data = sets[name]
    assert checksum(eval_batches(data, data.val, 16)) == val
    assert checksum(eval_batches(data, data.train, 16)) == train


@pytest.mark.parametrize(("channels", "padding"), [(3, 2), (1, 1), (3, 0)])
def test_crops_and_flips_agree_with_a_loop_over_images(channels: int, padding: int) -> None:
    data = toy(channels=channels, padding=padding)
    chosen = torch.tensor([0, 19, 19, 7, 3])
    top, left = torch.randint(2 * padding + 1, (2, 5), generator=torch.Generator().manual_seed(1))
    top[1], left[1] = 2 * padding, 2 * padding  # the last image's last corner
    flips = torch.tensor([True, False, True, True, False])
    got = random_flips(random_crops(data.padded.images, data.image_size, chosen, top, left), flips)
    for b in range(5):
        edges = ((padding, padding), (padding, padding), (0, 0))
        crop = np.pad(data.train.images[chosen[b]].numpy(), edges)[top[b] : top[b] + 6, left[b] : left[b] + 6]
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
    batches = [restore(d, next(train_batches(d, 2000, seed=0, epoch=0))[0]) for d in (data, plain)]
    share = (batches[0] != batches[1]).flatten(1).any(1).float().mean()
    assert 0.4 < share < 0.55  # a few crops are black, and look the same flipped
    black = (batches[1] == 0).all(3).flatten(1)  # which of the four pixels lie in the padding
    assert len(black.unique(dim=0)) == 9  # nine offsets, nine patterns
    assert torch.equal(batches[0].long().sum(2), batches[1].long().sum(2))  # flips change the crops in no other way


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


def test_a_pass_that_starts_later_has_the_rest_of_the_whole_pass() -> None:
    whole = list(train_batches(toy(), 4, seed=0, epoch=0))
    rest = list(train_batches(toy(), 4, seed=0, epoch=0, start=3))
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize(("batch_size", "steps"), [(20, 1), (8, 2), (7, 2), (500, 1), (1, 20)])
def test_an_epoch_has_full_batches_only(batch_size: int, steps: int) -> None:
    sizes = [len(labels) for _, labels in train_batches(toy(), batch_size, seed=0, epoch=0)]
    assert sizes == [min(batch_size, 20)] * steps
    assert steps_per_epoch(toy(), batch_size) == steps


@pytest.mark.parametrize("flip", [True, False])
def test_batches_are_channels_last_floats(flip: bool) -> None:
    images, labels = next(train_batches(toy(flip=flip), 8, seed=0, epoch=0))
    assert images.shape == (8, 3, 6, 6)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_making_batches_leaves_the_images_as_they_are() -> None:
    data = toy()
    for _ in train_batches(data, 8, seed=0, epoch=0), eval_batches(data, data.train, 8):
        list(_)
    assert data.checksum == toy().checksum


@pytest.mark.parametrize("split", ["val", "train"])
def test_eval_batches_are_the_whole_split_in_order(split: str) -> None:
    data = toy()
    images, labels = getattr(data, split).images, getattr(data, split).labels
    batches = list(eval_batches(data, getattr(data, split), 9))
    assert [len(found) for _, found in batches] == [9] * (len(labels) // 9) + [len(labels) % 9]
    assert torch.equal(torch.cat([found for _, found in batches]), labels)
    expected = (images / 255 - data.mean) / data.std
    torch.testing.assert_close(torch.cat([found for found, _ in batches]), expected.permute(0, 3, 1, 2))


def areas(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32)


def test_the_area_of_a_whole_image_is_the_image():
    images = toy(4).train.images.contiguous()
    assert torch.allclose(random_areas(images, areas(*[(1, 1, 0, 0)] * 4)), images.float(), atol=1e-3)


def test_an_area_holds_what_lies_in_it_alone():
    images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    images[:, 4:, :, :] = 200
    upper, lower = random_areas(images, areas((0.25, 0.5, 0.0, 0.3), (0.25, 0.5, 0.7, 0.3)))

    assert upper.max() == 0
    assert lower.min() == 200


def test_areas_keep_size_order_and_colours():
    images = torch.arange(1, 7, dtype=torch.uint8).view(2, 1, 1, 3).expand(2, 9, 7, 3).contiguous()
    cut = random_areas(images, areas((0.5, 0.4, 0.2, 0.1), (0.3, 0.9, 0.6, 0.0)))

    assert torch.allclose(cut, images.float())


def test_large_images_are_cropped_by_random_areas_and_small_ones_by_padding(tmp_path):
    for size in (64, 65):
        for name in ("a", "b"):
            for k in range(4):
                write_image(tmp_path / str(size) / name / f"{k}.png", (size, size), seed=k)
    small, large = (load_data(DataConfig(name=str(tmp_path / str(size))), tmp_path) for size in (64, 65))

    assert (small.resized, small.padding) == (False, 8)
    assert (large.resized, large.padding) == (True, 0)
    assert not load_data(DataConfig(name=str(tmp_path / "65"), padding=4), tmp_path).resized
    assert load_data(DataConfig(name=str(tmp_path / "64"), crop="resized"), tmp_path).resized
    none = load_data(DataConfig(name=str(tmp_path / "65"), crop="none"), tmp_path)
    assert (none.resized, none.padding) == (False, 0)


def test_random_areas_of_workers_are_those_of_one():
    data = dataclasses.replace(toy(24, padding=0), resized=True)
    whole = next(train_batches(data, 12, seed=1, epoch=2))[0]
    shares = [next(train_batches(data, 12, seed=1, epoch=2, rank=rank, world=2))[0] for rank in (0, 1)]

    assert whole.shape == (12, 3, 6, 6)
    assert torch.equal(whole[0::2], shares[0])
    assert torch.equal(whole[1::2], shares[1])
    assert not torch.equal(whole, next(train_batches(data, 12, seed=1, epoch=3))[0])
