"""Folders of images: find classes and files, decode every image once, keep the arrays.

A folder holds ``train/`` and, where there are any, ``val/`` and ``test/``, each with one sub-folder per class;
or it holds the class folders itself. Decoded splits are kept as ``CACHE/KEY.npy``, where KEY hashes every file's
relative path, size and modification time together with the decoding settings: a changed folder is decoded
anew, a moved one is not. Kept arrays are mapped from their files, so nothing is read but what is copied from them.
Caches are never removed here; deleting them is always safe.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dfkt.data.decode import decode_all, shorter_sides
from dfkt.data.listing import (
    Listing,
    check_classes,
    check_filled,
    check_not_empty,
    class_names,
    find_splits,
    list_images,
    shown,
    what_is_left_out,
)
from dfkt.data.locked import locked
from dfkt.data.source import Arrays, Source
from dfkt.errors import DataError

CACHE_VERSION = 1
"""To be raised whenever decoding gives other pixels than before."""
SAMPLED = 20
"""Classes whose first images are looked at to tell whether all have one size."""


def read_folder(folder: Path, cache: Path, *, size: int | None = None) -> Source:
    """Return what a folder of images has for training, decoding what the cache does not hold.

    No image of ``test/`` is opened, only its files are listed.

    Args:
        folder: Folder with ``train/`` and optionally ``val/`` and ``test/``, or with the class folders themselves.
        cache: Folder for the decoded arrays; made if missing.
        size: Height and width in pixels; ``None`` takes the shorter side of the first training image. Other images
            are resized to that shorter side and cropped at the centre.

    Raises:
        DataError: If there are fewer than two classes, an empty class, an empty split, a class that ``train/`` lacks,
            or what cannot be read.
    """
    folders = find_splits(folder)
    classes = class_names(folders["train"])
    if len(classes) < 2:
        found = f"only {shown(classes[0])!r}" if classes else "none"
        raise DataError(
            f"`{shown(folders['train'])}` must hold one sub-folder for each of two or more classes, but has {found}."
        )
    for split, path in folders.items():
        check_classes(split, path, classes)
    listings = {split: list_images(path, classes) for split, path in folders.items()}
    check_filled(listings, classes)
    notes = what_is_left_out(folder, listings, classes)
    if size is None:
        size, more = _first_size(listings["train"])
        notes += more

    train, place = read_images(listings["train"], cache, size=size)
    val, places = None, [place.name]
    if "val" in listings:  # its size and channels follow train
        images, place = read_images(listings["val"], cache, size=train.shape[1], channels=train.shape[3])
        val = images, _labels(listings["val"])
        places.append(place.name)
    notes.append(f"decoded images are kept in {shown(cache)} ({', '.join(places)})")
    if "test" not in folders:
        notes.append("no test/ folder: a fifth of train was split off as test")
    return Source(
        shown(folder.resolve().name), classes, (train, _labels(listings["train"])), val, owns_test="test" in folders,
        padding=max(1, train.shape[1] // 8), flip=False, notes=tuple(notes),
    )  # fmt: skip


def read_folder_test(folder: Path, cache: Path, classes: tuple[str, ...], *, size: int, channels: int) -> Arrays | None:
    """Return the images under ``test/``, or ``None`` where there is no such folder.

    Args:
        folder: As for :func:`read_folder`.
        cache: As for :func:`read_folder`.
        classes: The classes of ``train/``.
        size: Height and width of the training images.
        channels: Theirs, 1 or 3.

    Raises:
        DataError: If it is empty, holds another class, or an image cannot be decoded.
    """
    listing = _list_test(folder, classes)
    if listing is None:
        return None
    return read_images(listing, cache, size=size, channels=channels)[0], _labels(listing)


def check_folder_test(folder: Path, cache: Path, classes: tuple[str, ...], *, size: int, channels: int) -> None:
    """Refuse a ``test/`` that :func:`read_folder_test` could not read, from its files' headers: no image is decoded.

    Nothing is opened where the cache holds the decoded images already.

    Args:
        folder: As for :func:`read_folder_test`.
        cache: Likewise.
        classes: Likewise.
        size: Likewise.
        channels: Likewise.

    Raises:
        DataError: As there; of an image that is cut off behind its header nothing is known yet.
    """
    listing = _list_test(folder, classes)
    if listing is not None and _kept(listing, cache, size, channels)[1] is None:
        shorter_sides(listing.paths, title="test")


def _list_test(folder: Path, classes: tuple[str, ...]) -> Listing | None:
    path = find_splits(folder).get("test")
    if path is None:
        return None
    check_classes("test", path, classes)
    listing = list_images(path, classes)
    check_not_empty("test", listing)
    return listing


def read_images(
    listing: Listing, cache: Path, *, size: int, channels: int | None = None
) -> tuple[NDArray[np.uint8], Path]:
    """Return a split's images, mapped from the file that keeps them, and that file.

    Of several processes at once only one decodes.

    Args:
        listing: What to read.
        cache: Folder for the decoded arrays; made if missing.
        size: Height and width of the result.
        channels: 1 or 3; ``None`` gives 1 if every image is grey, else 3.

    Raises:
        DataError: If an image cannot be decoded, or the cache cannot be written.
    """
    path, images = _kept(listing, cache, size, channels)
    if images is not None:
        return images, path
    try:
        with locked(cache, f"{path.name}.lock"):
            images = _kept(listing, cache, size, channels)[1]  # another process may have written it meanwhile
            if images is None:
                _decode(listing, path, size, channels)
                images = _map(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"The data root must be writable, but {shown(cache)} is not ({reason}). Set another data root."
        ) from error
    return images, path


def _kept(listing: Listing, cache: Path, size: int, channels: int | None) -> tuple[Path, NDArray[np.uint8] | None]:
    """Return the file that keeps a listing's decoded images, and these; ``None`` if it is missing or damaged."""
    settings = repr((CACHE_VERSION, listing.stamp, size, channels))
    path = cache / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npy"
    return path, _load(path, (len(listing.files), size))


def _first_size(listing: Listing) -> tuple[int, list[str]]:
    """Return the shorter side of the first image, and a note where other classes' first images have other sizes."""
    firsts = sorted({label: place for place, label in reversed([*enumerate(listing.labels)])}.values())
    sides = shorter_sides([listing.folder / listing.files[place] for place in firsts[:SAMPLED]])
    if len({*sides}) == 1:
        return sides[0], []
    size, first = sides[0], shown(listing.files[0])
    note = f"images of several sizes become {size}x{size}, as the first is ({first}); --image-size sets another"
    return size, [note]


def _labels(listing: Listing) -> NDArray[np.int64]:
    return np.array(listing.labels, dtype=np.int64)


def _load(path: Path, expected: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Map the array kept in ``path``; ``None`` if it is missing or damaged."""
    count, size = expected
    try:
        images = _map(path)
    except (OSError, ValueError, EOFError):
        return None
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[:3] == (count, size, size)
    return images if fits and images.shape[3] in (1, 3) else None


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError:  # some network file systems cannot map files
        return np.asarray(np.load(path, allow_pickle=False))


def _decode(listing: Listing, path: Path, size: int, channels: int | None) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            decode_all(listing.paths, file, size=size, channels=channels, title=listing.folder.name)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
