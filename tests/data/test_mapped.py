"""Images that stay in their file: the same batches as from memory, read ahead, and nothing kept."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import synthetic_images, write_image
from torch import Tensor

from dfkt.config import DataConfig
from dfkt.data import mapped
from dfkt.data.batches import eval_batches, train_batches
from dfkt.data.image_set import ImageSet, Split, channel_moments
from dfkt.data.load import LARGE, load_data, load_test
from dfkt.data.mapped import AHEAD, Rows, is_mapped, read_ahead


def on_disk(split: Split, path: Path) -> Split:
    """Return a split whose images lie in a file, there in another order and among others."""
    assert isinstance(split.images, Tensor)
    rows = torch.randperm(len(split) + 5)[: len(split)]
    array = np.full((len(split) + 5, *split.images.shape[1:]), 77, dtype=np.uint8)
    array[rows.numpy()] = split.images.numpy()
    np.save(path, array)
    return Split(Rows(np.asarray(np.load(path, mmap_mode="r")), rows), split.labels)


def both(tmp_path: Path, *, resized: bool = False, flip: bool = True) -> tuple[ImageSet, ImageSet]:
    """Return the same images in memory and mapped."""
    memory = replace(synthetic_images(size=10, channels=3, padding=0, flip=flip), resized=resized)
    train, val = on_disk(memory.padded, tmp_path / "train.npy"), on_disk(memory.val, tmp_path / "val.npy")
    return memory, replace(memory, padded=train, val=val)


def equal(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) and torch.equal(k, m) for (a, k), (b, m) in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(("resized", "flip"), [(True, True), (True, False), (False, True)])
def test_batches_are_those_from_memory_to_the_last_bit(tmp_path: Path, resized: bool, flip: bool) -> None:
    memory, disk = both(tmp_path, resized=resized, flip=flip)
    for given in ({}, {"start": 2}, {"rank": 1, "world": 3}):
        ours, theirs = (list(train_batches(data, 20, seed=3, epoch=1, **given)) for data in (disk, memory))
        assert equal(ours, theirs)
    assert equal(list(eval_batches(disk, disk.val, 7)), list(eval_batches(memory, memory.val, 7)))


def test_what_is_said_of_a_set_is_what_is_said_of_it_in_memory(tmp_path: Path) -> None:
    memory, disk = both(tmp_path)
    assert (disk.checksum, disk.shape, disk.describe()) == (memory.checksum, memory.shape, memory.describe())
    assert disk.device == torch.device("cpu")
    for ours, theirs in zip(channel_moments(disk.train.images), channel_moments(memory.train.images), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_cut_as_tensors_are(tmp_path: Path) -> None:
    memory, disk = both(tmp_path)
    tensor, rows = memory.padded.images, disk.padded.images
    assert isinstance(rows, Rows)
    assert isinstance(tensor, Tensor)
    assert (len(rows), rows.shape) == (len(tensor), tensor.shape)
    assert torch.equal(rows[1::3].read(), tensor[1::3])
    assert all(map(torch.equal, rows.split(40), tensor.split(40)))


def test_batches_are_read_ahead_but_no_further_and_no_thread_stays(tmp_path: Path) -> None:
    _, disk = both(tmp_path)
    asked = []
    order = (asked.append(k) or torch.tensor([k]) for k in range(20))
    assert isinstance(disk.padded.images, Rows)
    batches = read_ahead(disk.padded.images, order, torch.device("cpu"))
    next(batches)
    assert len(asked) == AHEAD + 1
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_what_a_file_cannot_give_reaches_the_loop() -> None:
    rows = Rows(np.zeros((3, 2, 2, 1), dtype=np.uint8), torch.tensor([0, 1, 7]))
    with pytest.raises(IndexError, match="7"):
        list(read_ahead(rows, [torch.tensor([0, 1]), torch.tensor([2])], torch.device("cpu")))


def test_images_go_to_a_device_that_has_much_more_memory_than_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, disk = both(tmp_path)
    size = disk.padded.images.shape.numel()
    for memory, stays in ((size * 9, True), (size * 11, False)):
        monkeypatch.setattr(mapped, "_memory", lambda device, memory=memory: memory)
        moved = disk.padded.to("meta")
        assert isinstance(moved.images, Rows) is stays
        assert moved.labels.device.type == "meta"
    assert isinstance(disk.padded.to("cpu").images, Rows)


@pytest.mark.parametrize(("size", "stay"), [(LARGE, False), (LARGE + 1, True)])
def test_large_images_of_a_folder_stay_in_its_cache(tmp_path: Path, size: int, stay: bool) -> None:
    for split, count in (("train", 5), ("test", 2)):
        for k in range(2 * count):
            write_image(tmp_path / "pets" / split / ("cat", "dog")[k % 2] / f"{k}.png", size=(size, size), seed=k)
    config = DataConfig(name=str(tmp_path / "pets"), val_fraction=0.3)
    data = load_data(config, tmp_path / "root")
    test = load_test(config, tmp_path / "root", like=data)
    assert [isinstance(split.images, Rows) for split in (data.padded, data.val, test)] == [stay] * 3
    for images in (data.padded.images, data.val.images, test.images):
        assert not isinstance(images, Rows) or is_mapped(images.array)
    assert isinstance(load_data(replace(config, padding=2), tmp_path / "root").padded.images, Tensor)
    assert isinstance(load_data(replace(config, image_size=66), tmp_path / "root").padded.images, Rows)
