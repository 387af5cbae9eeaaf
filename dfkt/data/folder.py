"""Folders of images: find classes and files, decode every image once, keep the arrays.

A folder holds ``train/`` and, where there are any, ``val/`` and ``test/``, each with one sub-folder per class;
or it holds the class folders itself. Decoded splits are kept as ``CACHE/KEY.npy``, where KEY hashes every file's
relative path, size and modification time together with the decoding settings: a changed folder is decoded
anew, a moved one is not. Caches are never removed here; deleting them is always safe.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dfkt.errors import DataError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images ``[N, H, W, C]`` and labels ``[N]`` of one split."""

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
CACHE_VERSION = 1
"""To be raised whenever decoding gives other pixels than before."""
CHUNK = 64


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and path."""

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    stamp: str
    """Hash of the files' relative paths, sizes and modification times."""


def read_folder(
    folder: Path, cache: Path, *, size: int | None = None, test: bool = False
) -> tuple[tuple[str, ...], dict[str, Arrays], list[str]]:
    """Return classes, splits and notes of a folder of images, decoding what the cache does not hold.

    Args:
        folder: Folder with ``train/`` and optionally ``val/`` and ``test/``, or with the class folders themselves.
        cache: Folder for the decoded arrays; made if missing.
        size: Height and width in pixels; ``None`` takes the shorter side of the first training image. Other images
            are resized to that shorter side and cropped at the centre.
        test: Decode ``test/`` too; otherwise only its class names are looked at.

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
        unknown = [name for name in _class_names(path) if name not in classes]
        if unknown:
            raise DataError(f"Every class of {split}/ must be in train/ too, but got {', '.join(unknown)} in {path}.")
    listings = {s: list_images(p, classes) for s, p in folders.items() if test or s != "test"}
    _check_filled(listings, classes)

    splits: dict[str, Arrays] = {}
    channels: int | None = None
    places = []
    for split, listing in listings.items():
        images, place = read_images(listing, cache, size=size or _first_size(listing), channels=channels)
        size, channels = images.shape[1], images.shape[3]  # val and test follow train
        splits[split] = images, np.array(listing.labels, dtype=np.int64)
        places.append(place.name)
    return classes, splits, [f"decoded images are kept in {cache} ({', '.join(places)})"]


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
    """Return a split's images and the file that keeps them; of several processes at once only one decodes.

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
                images = decode_all(listing, size=size, channels=channels)
                _save(path, images)
    except OSError as error:
        raise DataError(
            f"The data root must be writable, but {cache} is not ({error}). Set another data root."
        ) from error
    return images, path


def decode_all(listing: Listing, *, size: int, channels: int | None = None) -> NDArray[np.uint8]:
    """Decode every image of a split in parallel, with a progress bar where someone is watching."""
    count = len(listing.files)
    images = np.empty((count, size, size, channels or 3), dtype=np.uint8)
    grey = np.zeros(count, dtype=np.bool_)

    def decode(start: int) -> int:
        stop = min(start + CHUNK, count)
        for i in range(start, stop):
            image = decode_image(listing.folder / listing.files[i], size=size, channels=channels)
            images[i], grey[i] = image, image.shape[2] == 1
        return stop - start

    bar = tqdm(total=count, desc=f"decoding {listing.folder.name}", unit="img", disable=None)
    with bar, ThreadPool(os.cpu_count()) as pool:  # PIL decodes and resizes without holding the GIL
        for done in pool.imap_unordered(decode, range(0, count, CHUNK)):
            bar.update(done)
    return np.ascontiguousarray(images[..., :1]) if grey.all() else images


def decode_image(path: Path, *, size: int, channels: int | None = None) -> NDArray[np.uint8]:
    """Return one image as ``[size, size, C]``: shorter side resized, centre cropped.

    Raises:
        DataError: If the file cannot be decoded.
    """
    try:
        with Image.open(path) as opened:
            image = _convert(opened, grey=opened.mode in GREY_MODES if channels is None else channels == 1)
        short = min(image.size)
        if short != size:
            width, height = (max(size, round(side * size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image)[top : top + size, left : left + size].reshape(size, size, -1)
    except Exception as error:  # PIL's decoders raise nearly anything on broken files
        raise _broken(path, error) from error


def _convert(image: Image.Image, *, grey: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL would clip them at 255
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if grey else "RGB")


def _first_size(listing: Listing) -> int:
    path = listing.folder / listing.files[0]
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception as error:  # as in decode_image
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"Every image must be readable, but {path} is not ({reason}). Remove or replace it.")


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


def _check_filled(listings: dict[str, Listing], classes: tuple[str, ...]) -> None:
    known = f"Images end in {', '.join(EXTENSIONS)}."
    for split, listing in listings.items():
        if not listing.files:
            raise DataError(f"The {split} split must hold images, but {listing.folder} has none. {known}")
    filled = set(listings["train"].labels)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"Every class must have training images, but {', '.join(empty)} has none. {known}")


def _load(path: Path, expected: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Return the array kept in ``path``, or ``None`` if it is missing or damaged."""
    count, size = expected
    try:
        images: NDArray[np.uint8] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[:3] == (count, size, size)
    return images if fits and images.shape[3] in (1, 3) else None


def _save(path: Path, images: NDArray[np.uint8]) -> None:
    part = path.with_suffix(".part")  # one name is enough: the lock is held
    with part.open("wb") as file:
        np.save(file, images)
    os.replace(part, path)
