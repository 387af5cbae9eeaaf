"""Image sets: a name or a folder becomes splits of uint8 tensors, augmented in batches on their own device.

``val`` is held out of the training images, stratified by class, and selects; ``test`` reports and is read only when
asked for. ``digits`` (scikit-learn's, bundled) has no official test split: a fixed stratified fifth stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkt.config import KNOWN_SETS, DataConfig
from dfkt.errors import DataError
from dfkt.data.folder import Arrays, find_splits, read_folder
from dfkt.data.named import Source, read_known

TEST_FRACTION = 0.2
TEST_SEED = 0
"""Where a set has no test split of its own; never a setting, so that one set has one test split."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in one order."""

    images: Tensor
    """``[N, H, W, C]``, uint8."""
    labels: Tensor
    """``[N]``, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The splits of one set of images, and how they are normalised and augmented."""

    name: str
    title: str
    """Name for tables."""
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    """``None`` unless asked for."""
    mean: Tensor
    """``[C]``, of the training split in units of 0..1."""
    std: Tensor
    """``[C]``, as ``mean``."""
    padding: int
    flip: bool
    notes: tuple[str, ...] = ()
    """What the user must be told."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[1], self.train.images.shape[2]

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on another device."""
        test = None if self.test is None else self.test.to(device)
        mean, std = self.mean.to(device), self.std.to(device)
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=test, mean=mean, std=std)

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 ``[B, H, W, C]`` as float32 ``[B, C, H, W]`` of mean 0 and std 1, channels last in memory."""
        batch, height, width, channels = images.shape
        # Per-channel factors repeated over a row: the inner loop is then W * C long instead of C.
        scale = (1 / (255 * self.std)).repeat(width)
        shift = (-self.mean / self.std).repeat(width)
        flat = images.reshape(batch, height, width * channels).float().mul_(scale).add_(shift)
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)

    @cached_property
    def _padded(self) -> Tensor:
        p = self.padding
        return F.pad(self.train.images, (0, 0, p, p, p, p)) if p else self.train.images


def steps_per_epoch(data: ImageSet, batch_size: int) -> int:
    """Return the number of full batches in the training split; a batch is never larger than the split."""
    return max(1, len(data.train) // batch_size)


def train_batches(
    data: ImageSet, batch_size: int, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, randomly cropped and flipped, normalised training batches.

    Args:
        data: The set, on the device where the batches are wanted.
        batch_size: Images per step, over all workers together; an incomplete last batch is dropped.
        seed: With ``epoch`` it fixes order, crops and flips, whatever the device and the number of workers.
        epoch: Number of the pass over the training split.
        start: First step to yield; the batches are those that a whole pass has from there on.
        rank: This worker gets ``global_batch[rank::world]``.
        world: Number of workers.

    Yields:
        Images ``[B, C, H, W]``, float32, channels last in memory; labels ``[B]``, int64.
    """
    count, size, device = len(data.train), min(batch_size, len(data.train)), data.train.images.device
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    draws = torch.Generator().manual_seed(int(state) >> 1)
    order = torch.randperm(count, generator=draws)
    tops, lefts = torch.randint(2 * data.padding + 1, (2, count), generator=draws)
    flips = torch.rand(count, generator=draws) < (0.5 if data.flip else 0.0)
    plan = [drawn.to(device) for drawn in (order, tops, lefts, flips)]
    for step in range(start, steps_per_epoch(data, batch_size)):
        chosen, top, left, flip = (p[step * size : (step + 1) * size][rank::world] for p in plan)
        images = _augment(data._padded, data.image_size, chosen, top, left, flip)
        yield data.normalise(images), data.train.labels[chosen]


def eval_batches(data: ImageSet, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a split's batches in order, normalised and not augmented, with the incomplete last one."""
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        yield data.normalise(images), labels


def _augment(
    padded: Tensor, image_size: tuple[int, int], chosen: Tensor, top: Tensor, left: Tensor, flip: Tensor
) -> Tensor:
    """Select, crop and flip without a loop over images; gives ``[B, H, W, C]``, uint8.

    A row of a crop is ``W * C`` bytes that lie together, so one ``index_select`` over overlapping windows copies it
    whole: on CPUs this is about five times as fast as indexing pixels with broadcast rows and columns.
    """
    height, width = image_size
    count, rows, columns, channels = padded.shape
    windows = padded.as_strided((count * rows * columns - width + 1, width * channels), (channels, 1))
    first = (chosen * rows + top) * columns + left
    starts = first[:, None] + columns * torch.arange(height, device=padded.device)
    crops = windows.index_select(0, starts.flatten()).view(-1, height, width, channels)
    both = torch.cat((crops, crops.flip(2)))
    return both.index_select(0, torch.arange(len(crops), device=padded.device) + len(crops) * flip)


def load_data(config: DataConfig, *, test: bool = False) -> ImageSet:
    """Return a set's splits on the CPU.

    Args:
        config: Which images, how they are split and augmented.
        test: Read the test split too.

    Raises:
        DataError: If the set is unknown, cannot be read or downloaded, or is too small to be split.

    Example:
        >>> data = load_data(DataConfig(name="digits"))
        >>> len(data.train), len(data.val), data.test, data.image_size
        (1293, 145, None, (8, 8))
    """
    source = _read(config, test)
    splits = {name: _to_split(arrays, source.classes, config.image_size) for name, arrays in source.arrays.items()}
    train, classes = splits["train"], source.classes
    kept = torch.arange(len(train))
    if not source.owns_test:
        kept, held = _hold_out(train.labels, kept, TEST_FRACTION, TEST_SEED, classes)
        splits["test"] = _select(train, held)
    if config.limit_train is not None:
        kept = _limit(train.labels, kept, config.limit_train, config.split_seed, classes)
    if "val" not in splits:
        kept, held = _hold_out(train.labels, kept, config.val_fraction, config.split_seed, classes)
        splits["val"] = _select(train, held)
    train = _select(train, kept)
    if test and config.limit_test is not None:
        labels = splits["test"].labels
        few = _limit(labels, torch.arange(len(labels)), config.limit_test, config.split_seed, classes)
        splits["test"] = _select(splits["test"], few)
    mean, std = _moments(train.images)
    return ImageSet(
        name=config.name, title=source.title, classes=classes, train=train, val=splits["val"],
        test=splits["test"] if test else None, mean=mean, std=std,
        padding=source.padding if config.padding is None else config.padding,
        flip=source.flip if config.flip is None else config.flip, notes=source.notes,
    )  # fmt: skip


def _read(config: DataConfig, test: bool) -> Source:
    root, folder = Path(config.root).expanduser(), Path(config.name).expanduser()
    if config.name in KNOWN_SETS:
        return read_known(config.name, root, test=test)
    if not folder.is_dir():
        raise DataError(
            f"The data must be one of {', '.join(KNOWN_SETS)}, or an existing folder, but got {config.name!r}."
        )
    classes, arrays, notes = read_folder(folder, root / "folders", size=config.image_size, test=test)
    owns_test = "test" in find_splits(folder)
    if not owns_test:
        notes.append("no test/ folder: a fifth of train was split off as test")
    padding = max(1, arrays["train"][0].shape[1] // 8)
    return Source(folder.resolve().name, classes, arrays, owns_test, padding, flip=True, notes=tuple(notes))


def _to_split(arrays: Arrays, classes: tuple[str, ...], size: int | None) -> Split:
    images, labels = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
    _check_labels(labels, len(classes))
    return Split(images if size is None else _resize(images, size), labels)


def _check_labels(labels: Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"`0 <= label < {classes}` must hold, but got label={int(wrong[0])}.")


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[1:3] == (size, size):
        return images
    chunks = []
    for chunk in images.split(1024):
        floats = chunk.permute(0, 3, 1, 2).float()
        scaled = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        chunks.append(scaled.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous())
    return torch.cat(chunks)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std per channel in units of 0..1; std is at least 1/255, so constant images stay finite."""
    channels, count = images.shape[3], images[..., 0].numel()
    total = np.zeros((2, channels))
    # Chunks fit the processor's cache; NumPy, because thousands of small parallel loops stall on a busy machine.
    for chunk in np.array_split(images.numpy(), len(images) // 64 + 1):
        rows = chunk.reshape(-1, images.shape[2] * channels).astype(np.float32)
        sums = np.stack((rows.sum(0), np.square(rows).sum(0))).astype(np.float64)
        total += sums.reshape(2, -1, channels).sum(1)
    mean, square = torch.from_numpy(total) / count
    std = (square - mean.square()).clamp(min=1.0).sqrt()
    return (mean / 255).float(), (std / 255).float()


def _select(split: Split, chosen: Tensor) -> Split:
    if len(chosen) == len(split):
        return split
    return Split(split.images.index_select(0, chosen), split.labels.index_select(0, chosen))


def _hold_out(
    labels: Tensor, kept: Tensor, fraction: float, seed: int, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Part ``kept`` (indices into ``labels``) into what stays and what is held out, at least one of each class."""
    counts = torch.bincount(labels[kept], minlength=len(classes))
    few = int(counts.argmin())
    if counts[few] < 2:
        rule = "Every class must have 2 images or more to be split"
        raise DataError(f"{rule}, but class {classes[few]} has {counts[few]}. Add images, or raise limit_train.")
    quotas = (counts * fraction + 0.5).long().clamp(min=1).minimum(counts - 1)
    chosen = _stratified(labels[kept], quotas, seed)
    return kept[~chosen], kept[chosen]


def _limit(labels: Tensor, kept: Tensor, limit: int, seed: int, classes: tuple[str, ...]) -> Tensor:
    """Return at most ``limit`` of ``kept``, each class by its share (largest remainders get what is left)."""
    if limit >= len(kept):
        return kept
    counts = torch.bincount(labels[kept], minlength=len(classes))
    exact = counts.double() * (limit / len(kept))
    quotas = exact.floor().long()
    left = limit - int(quotas.sum())
    quotas[(quotas - exact).argsort(stable=True)[:left]] += 1
    return kept[_stratified(labels[kept], quotas, seed)]


def _stratified(labels: Tensor, quotas: Tensor, seed: int) -> Tensor:
    """Return a mask of ``quotas[c]`` random labels of every class c."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=len(quotas))
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[place < quotas[labels[order]]]] = True
    return mask
