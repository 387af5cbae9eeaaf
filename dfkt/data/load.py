"""Image sets: a name or a folder becomes splits of uint8 tensors on the CPU.

``val`` is held out of the training images, stratified by class, and selects; ``test`` reports and is read by a call of
its own. ``digits`` (scikit-learn's, bundled) has no official test split: a fixed stratified fifth stands in.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkt.config import KNOWN_SETS, DataConfig
from dfkt.data.folder import check_folder_test, read_folder, read_folder_test
from dfkt.data.image_set import CHUNK, ImageSet, Split, channel_moments, inside
from dfkt.data.listing import shown
from dfkt.data.mapped import Rows, is_mapped
from dfkt.data.named import check_known_test, read_known, read_known_test
from dfkt.data.source import Arrays, Source, blank
from dfkt.errors import DataError

LARGE = 64
"""Images of more pixels a side are cropped by random areas, not by a few pixels of padding."""
FAINT = 0.02
"""Training images whose colours spread less than this, in units of 0..1, are told of."""
TEST_FRACTION = 0.2
TEST_SEED = 0
"""Where a set has no test split of its own; never a setting, so that one set has one test split."""


def load_data(config: DataConfig, root: str | os.PathLike[str]) -> ImageSet:
    """Return what training sees of a set: its training split and ``val``, on the CPU.

    Args:
        config: Which images, how they are split and augmented.
        root: Where torchvision's sets are kept, and where decoded folders are cached.

    Raises:
        DataError: If the set is unknown, cannot be read or downloaded, or is too small to be split.

    Example:
        >>> data = load_data(DataConfig(name="digits"), root="unused")
        >>> len(data.train), len(data.val), data.image_size, data.padding
        (1293, 145, (8, 8), 1)
    """
    source = _read(config, _place(root), config.image_size)
    classes, seed = source.classes, config.split_seed
    labels = _labels(source.train, classes)
    kept = torch.arange(len(labels))
    if not source.owns_test:
        kept, _ = _hold_out(labels, kept, TEST_FRACTION, TEST_SEED, classes)
    if config.limit_train is not None:
        kept = _limit(labels, kept, config.limit_train, seed, classes)
    if source.val is None:
        kept, held = _hold_out(labels, kept, config.val_fraction, seed, classes)
        val = _select(source.train, held, config.image_size)
    else:
        val = _select(source.val, torch.arange(len(_labels(source.val, classes))), config.image_size)
    size = config.image_size or source.train[0].shape[1]
    crop = config.crop or ("resized" if size > LARGE and config.padding is None else "padded")
    padding = (source.padding if config.padding is None else config.padding) if crop == "padded" else 0
    padded = _select(source.train, kept, config.image_size, padding)
    mean, std = channel_moments(inside(padded.images, padding))
    notes = list(source.notes)
    if std.max() < FAINT:
        notes.append(
            f"training images hardly differ (std {std.max():.3f}): do they use the bits that their files have?"
        )
    return ImageSet(
        name=config.name, title=source.title, classes=classes, padded=padded, val=val, mean=mean, std=std,
        padding=padding, flip=source.flip if config.flip is None else config.flip, resized=crop == "resized",
        notes=tuple(notes),
    )  # fmt: skip


def load_test(config: DataConfig, root: str | os.PathLike[str], like: ImageSet) -> Split:
    """Return a set's test split on the CPU; only this call opens the test images.

    Args:
        config: As for :func:`load_data`.
        root: As for :func:`load_data`.
        like: What :func:`load_data` returned for them; height, width, channels and classes follow it.

    Raises:
        DataError: If the images cannot be read or downloaded.

    Example:
        >>> config = DataConfig(name="digits", limit_test=60)
        >>> len(load_test(config, "unused", like=load_data(config, "unused")))
        60
    """
    place, size, classes = _place(root), like.image_size[0], like.classes
    arrays = _read_test(config, place, like)
    if arrays is None:
        arrays = _read(config, place, size).train
        labels = _labels(arrays, classes)
        _, kept = _hold_out(labels, torch.arange(len(labels)), TEST_FRACTION, TEST_SEED, classes)
    else:
        labels = _labels(arrays, classes)
        kept = torch.arange(len(labels))
    if config.limit_test is not None:
        kept = _limit(labels, kept, config.limit_test, config.split_seed, classes)
    return _select(arrays, kept, size)


def check_test(config: DataConfig, root: str | os.PathLike[str], like: ImageSet) -> None:
    """Refuse a test split that :func:`load_test` could not read when training is over, without opening its images.

    Of a folder every file's header is read, of torchvision's sets the files' lengths or checksums. What is cut off
    behind its header shows only when the image is decoded.

    Args:
        config: As for :func:`load_data`.
        root: As for :func:`load_data`.
        like: As for :func:`load_test`.

    Raises:
        DataError: If a file is missing, damaged or no image, or can be neither read nor downloaded.

    Example:
        >>> config = DataConfig(name="digits")
        >>> check_test(config, "unused", like=load_data(config, "unused"))
    """
    if config.name in KNOWN_SETS:
        check_known_test(config.name, _place(root))
    else:
        cache, size = _place(root) / "folders", like.image_size[0]
        check_folder_test(_folder(config), cache, like.classes, size=size, channels=like.channels)


def _place(root: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(root):
        raise DataError(f"The data root must be a local folder, but got {shown(os.fspath(root))}.")
    return Path(os.path.expanduser(root))


def _read(config: DataConfig, root: Path, size: int | None) -> Source:
    if config.name in KNOWN_SETS:
        return read_known(config.name, root)
    return read_folder(_folder(config), root / "folders", size=size)


def _read_test(config: DataConfig, root: Path, like: ImageSet) -> Arrays | None:
    """Return the set's own test split, if it has one."""
    if config.name in KNOWN_SETS:
        return read_known_test(config.name, root)
    cache, size = root / "folders", like.image_size[0]
    return read_folder_test(_folder(config), cache, like.classes, size=size, channels=like.channels)


def _folder(config: DataConfig) -> Path:
    folder = os.path.expanduser(config.name)
    if not os.path.isdir(folder):
        known = f"The data must be one of {', '.join(KNOWN_SETS)}, or an existing folder, but got {config.name!r}"
        if "://" in folder:
            raise DataError(f"{known}. Images are read from local folders: copy them, or mount what the URI names.")
        raise DataError(f"{known}{', a file. Unpack it' if os.path.isfile(folder) else ''}.")
    return Path(folder)


def _labels(arrays: Arrays, classes: tuple[str, ...]) -> Tensor:
    labels = torch.from_numpy(arrays[1])
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(f"`0 <= label < {len(classes)}` must hold, but got label={int(wrong[0])}.")
    return labels


def _select(arrays: Arrays, chosen: Tensor, size: int | None, padding: int = 0) -> Split:
    """Copy the chosen images, and only these: resized to ``size``, with ``padding`` zeros at every edge.

    Large images that need neither stay where they are mapped. Of the others, NumPy allocates and copies: for large arrays it asks
    for huge pages, which makes this four times as fast.
    """
    images, labels = arrays
    height, width = images.shape[1:3] if size is None else (size, size)
    if not padding and images.shape[1:3] == (height, width) and height > LARGE and is_mapped(images):
        return Split(Rows(images, chosen), torch.from_numpy(labels[chosen.numpy()]))
    zeros = blank(len(chosen), height + 2 * padding, width + 2 * padding, images.shape[3])
    padded, rows = torch.from_numpy(zeros), chosen.numpy()
    target = zeros[:, padding : padding + height, padding : padding + width]
    for start in range(0, len(rows), CHUNK):
        few = rows[start : start + CHUNK]
        target[start : start + CHUNK] = _resize(torch.from_numpy(images[few]), height, width).numpy()
    return Split(padded, torch.from_numpy(labels[rows]))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[1:3] == (height, width):
        return images
    floats = images.permute(0, 3, 1, 2).float()
    scaled = F.interpolate(floats, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)


def _hold_out(
    labels: Tensor, kept: Tensor, fraction: float, seed: int, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Part ``kept`` (indices into ``labels``) into what stays and what is held out, at least one of each class."""
    counts = torch.bincount(labels[kept], minlength=len(classes))
    few = int(counts.argmin())
    if counts[few] < 2:
        rule = "Every class must have 2 images or more to be split"
        raise DataError(f"{rule}, but class {shown(classes[few])} has {counts[few]}. Add images, or raise limit_train.")
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
