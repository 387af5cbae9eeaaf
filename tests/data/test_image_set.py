"""An image set in memory: one copy of the training images, its checksum, its moves, its moments."""

import zlib

import pytest
import torch
from conftest import synthetic_images
from torch import Tensor

from dfkt.config import DataConfig
from dfkt.data.batches import eval_batches, train_batches
from dfkt.data.image_set import ImageSet, Split, channel_moments
from dfkt.data.load import load_data


def tensors(data: ImageSet) -> list[Tensor]:
    """All that a set holds, once it has been used."""
    next(train_batches(data, 8, seed=0, epoch=0))
    next(eval_batches(data, data.val, 8))
    assert data.checksum >= 0
    found: list[Tensor] = []
    waiting: list[object] = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (ImageSet, Split)):
            waiting += vars(value).values()
    return found


def test_training_images_are_held_once() -> None:
    data = synthetic_images(size=6, channels=3, padding=2)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(data)}
    assert sum(size for size in held.values() if size >= 96 * 6 * 6 * 3) == 96 * 10 * 10 * 3
    assert data.train.images.untyped_storage().data_ptr() == data.padded.images.untyped_storage().data_ptr()


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_the_inside_of_the_padded_images_are_the_training_images(padding: int) -> None:
    plain, data = synthetic_images(padding=0), synthetic_images(padding=padding)
    assert torch.equal(data.train.images, plain.padded.images)
    assert torch.equal(data.train.labels, plain.train.labels)
    assert data.padded.images.shape == (96, 8 + 2 * padding, 8 + 2 * padding, 1)
    assert data.padded.images.long().sum() == data.train.images.long().sum()  # the edges are zero
    assert (data.image_size, data.channels, data.num_classes, len(data.train)) == ((8, 8), 1, 4, 96)


def test_a_set_that_is_given_no_moments_takes_its_own() -> None:
    split = Split(torch.tensor([0, 255, 51, 51], dtype=torch.uint8).view(2, 1, 1, 2), torch.tensor([0, 1]))
    data = ImageSet.make(split, split, ("a", "b"), name="two", padding=1)
    torch.testing.assert_close(data.mean, torch.tensor([0.1, 0.6]))
    torch.testing.assert_close(data.std, torch.tensor([0.1, 0.4]))
    assert data.title == "two"


def test_constant_images_have_a_finite_std() -> None:
    mean, std = channel_moments(torch.full((3, 2, 2, 1), 51, dtype=torch.uint8))
    assert (mean.item(), std.item()) == pytest.approx((0.2, 1 / 255))


def test_moments_of_many_images_agree_with_double_precision() -> None:
    images = torch.randint(256, (300, 5, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = channel_moments(images[:, 1:4, 1:4])
    exact = (images[:, 1:4, 1:4].double() / 255).flatten(0, 2)
    torch.testing.assert_close(mean.double(), exact.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(std.double(), exact.std(0, correction=0), atol=1e-6, rtol=0)


def test_mean_and_std_normalise_the_training_split() -> None:
    data = load_data(DataConfig(), "unused")
    images = torch.cat([images for images, _ in eval_batches(data, data.train, 500)])
    assert abs(images.mean()) < 1e-4
    assert abs(images.std(correction=0) - 1) < 1e-4


def test_the_checksum_is_that_of_the_images_without_their_edges_and_of_the_labels() -> None:
    data = synthetic_images(count=2500, padding=2)
    images = data.train.images.contiguous().numpy().tobytes()
    assert data.checksum == zlib.crc32(data.train.labels.numpy().tobytes(), zlib.crc32(images))
    assert data.checksum == synthetic_images(count=2500, padding=0).checksum


def test_a_changed_pixel_or_label_changes_the_checksum() -> None:
    data = synthetic_images()
    pixel, label = synthetic_images(), synthetic_images()
    pixel.train.images[95, 7, 7, 0] += 1
    label.train.labels[95] = 0
    assert len({data.checksum, pixel.checksum, label.checksum}) == 3


def test_a_set_moves_as_a_whole() -> None:
    data = synthetic_images().to("meta")
    assert data.mean.is_meta
    assert data.std.is_meta
    assert all(
        tensor.is_meta for split in (data.padded, data.train, data.val) for tensor in (split.images, split.labels)
    )
    assert data.image_size == (8, 8)


def test_a_set_that_is_there_already_is_not_copied() -> None:
    data = synthetic_images()
    assert [a is b for a, b in zip(tensors(data), tensors(data.to("cpu")), strict=True)] == [True] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_set_on_a_gpu_has_the_same_checksum() -> None:
    assert synthetic_images().to("cuda").checksum == synthetic_images().checksum
