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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dfkt.data.decode import decode_all, shorter_side
from dfkt.data.source import Arrays, Source
from dfkt.errors import DataError

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
CACHE_VERSION = 1
"""To be raised whenever decoding gives other pixels than before."""
_KNOWN_ENDINGS = f"Images end in {', '.join(EXTENSIONS)}."


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and path."""

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    stamp: str
    """Hash of the files' relative paths, sizes and modification times."""

    @property
    def paths(self) -> list[Path]:
        """The files with their folder."""
        return [self.folder / file for file in self.files]


def read_folder(folder: Path, cache: Path, *, size: int | None = None) -> Source:
    """Return what a folder of images has for training, decoding what the cache does not hold.

    No image of ``test/`` is opened, only its class names are looked at.

    Args:
        folder: Folder with ``train/`` and optionally ``val/`` and ``test/``, or with the class folders themselves.
        cache: Folder for the decoded arrays; made if missing.
        size: Height and width in pixels; ``None`` takes the shorter side of the first training image. Other images
            are resized to that shorter side and cropped at the centre.

    Raises:
        DataError: If there are fewer than two classes, an empty class, a class that ``train/`` lacks, or an image
            that cannot be decoded.
    """
    folders = find_splits(folder)
    classes = _class_names(folders["train"])
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(
            f"`{folders['train']}` must hold one sub-folder for each of two or more classes, but has {found}."
        )
    for split, path in folders.items():
        _check_classes(split, path, classes)
    listings = {split: list_images(path, classes) for split, path in folders.items() if split != "test"}
    _check_filled(listings, classes)

    train, place = read_images(listings["train"], cache, size=size or _first_size(listings["train"]))
    val, places = None, [place.name]
    if "val" in listings:  # its size and channels follow train
        images, place = read_images(listings["val"], cache, size=train.shape[1], channels=train.shape[3])
        val = images, _labels(listings["val"])
        places.append(place.name)
    notes = [f"decoded images are kept in {cache} ({', '.join(places)})"]
    if "test" not in folders:
        notes.append("no test/ folder: a fifth of train was split off as test")
    return Source(
        folder.resolve().name, classes, (train, _labels(listings["train"])), val, owns_test="test" in folders,
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
    path = find_splits(folder).get("test")
    if path is None:
        return None
    _check_classes("test", path, classes)
    listing = list_images(path, classes)
    _check_not_empty("test", listing)
    return read_images(listing, cache, size=size, channels=channels)[0], _labels(listing)


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the folders of ``train`` and of ``val`` and ``test`` where they exist.

    Raises:
        DataError: If there is ``val/`` or ``test/`` but no ``train/``.
    """
    names = _class_names(folder)
    # A class may itself be called "train": then it stands beside other classes and holds no folders.
    is_class = "train" in names and not _class_names(folder / "train") and bool(set(names) - set(SPLITS))
    if "train" in names and not is_class:
        return {split: folder / split for split in SPLITS if split in names}
    if not is_class and (found := [split for split in SPLITS if split in names]):
        raise DataError(f"A folder with {found[0]}/ must hold train/ beside it, but {folder} does not.")
    return {"train": folder}


def list_images(folder: Path, classes: tuple[str, ...]) -> Listing:
    """Return the image files under ``folder/CLASS`` for every class, without opening them."""
    found: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            found += sorted(_scan(folder / name, name))
            labels += [label] * (len(found) - len(labels))
    stamp = hashlib.sha256(repr(found).encode()).hexdigest()
    return Listing(folder, tuple(entry[0] for entry in found), tuple(labels), stamp)


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
    settings = repr((CACHE_VERSION, listing.stamp, size, channels))
    path = cache / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npy"
    expected = len(listing.files), size
    images = _load(path, expected)
    if images is not None:
        return images, path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            images = _load(path, expected)  # another process may have written it meanwhile
            if images is None:
                images = decode_all(listing.paths, size=size, channels=channels, title=listing.folder.name)
                _save(path, images)
                images = _map(path)  # the decoded copy is given up
    except OSError as error:
        raise DataError(
            f"The data root must be writable, but {cache} is not ({error}). Set another data root."
        ) from error
    return images, path


def _class_names(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _scan(folder: Path | str, prefix: str) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                stat = entry.stat()
                found.append((f"{prefix}/{name}", stat.st_size, stat.st_mtime_ns))
            elif entry.is_dir():
                found += _scan(entry.path, f"{prefix}/{name}")
    return found


def _first_size(listing: Listing) -> int:
    return shorter_side(listing.folder / listing.files[0])


def _labels(listing: Listing) -> NDArray[np.int64]:
    return np.array(listing.labels, dtype=np.int64)


def _check_classes(split: str, folder: Path, classes: tuple[str, ...]) -> None:
    unknown = [name for name in _class_names(folder) if name not in classes]
    if unknown:
        raise DataError(f"Every class of {split}/ must be in train/ too, but got {', '.join(unknown)} in {folder}.")


def _check_filled(listings: dict[str, Listing], classes: tuple[str, ...]) -> None:
    for split, listing in listings.items():
        _check_not_empty(split, listing)
    filled = set(listings["train"].labels)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"Every class must have training images, but {', '.join(empty)} has none. {_KNOWN_ENDINGS}")


def _check_not_empty(split: str, listing: Listing) -> None:
    if not listing.files:
        raise DataError(f"The {split} split must hold images, but {listing.folder} has none. {_KNOWN_ENDINGS}")


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


def _save(path: Path, images: NDArray[np.uint8]) -> None:
    part = path.with_suffix(".part")  # one name is enough: the lock is held
    with part.open("wb") as file:
        np.save(file, images)
    os.replace(part, path)
