"""Which files of a folder are its images: found by their endings and told by their folders, none of them opened."""

from __future__ import annotations

import hashlib
import mimetypes
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfkt.errors import DataError

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
KNOWN_ENDINGS = f"Images end in {', '.join(EXTENSIONS)}."
_NAMED = 5
"""Names that a message lists before it counts the rest."""
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and path."""

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    stamp: str
    """Hash of the files' relative paths, sizes and modification times."""
    others: tuple[str, ...] = ()
    """Relative paths of the files that are left out: of another ending, or beside the class folders."""

    @property
    def paths(self) -> list[Path]:
        """The files with their folder."""
        return [self.folder / file for file in self.files]


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the folders of ``train`` and of ``val`` and ``test`` where they exist.

    Raises:
        DataError: If there is ``val/`` or ``test/`` but no ``train/``, or a folder cannot be read.
    """
    names = class_names(folder)
    # A class may itself be called "train": then it stands beside other classes and holds no folders.
    is_class = "train" in names and not class_names(folder / "train") and bool(set(names) - set(SPLITS))
    if "train" in names and not is_class:
        return {split: folder / split for split in SPLITS if split in names}
    if not is_class and (found := [split for split in SPLITS if split in names]):
        raise DataError(f"A folder with {found[0]}/ must hold train/ beside it, but {shown(folder)} does not.")
    return {"train": folder}


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders in a folder, sorted; hidden ones are none.

    Raises:
        DataError: If the folder cannot be read.
    """
    return tuple(sorted(entry.name for entry in _entries(folder) if _is_folder(entry)))


def list_images(folder: Path, classes: tuple[str, ...]) -> Listing:
    """Return the image files under ``folder/CLASS`` for every class, without opening them.

    Raises:
        DataError: If a folder cannot be read or holds itself, or a file with an image's ending is no regular one.
    """
    found: list[tuple[str, int, int]] = []
    labels: list[int] = []
    others = sorted(entry.name for entry in _entries(folder) if not _is_folder(entry))
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            found += sorted(_scan(folder / name, name, others))
            labels += [label] * (len(found) - len(labels))
    stamp = hashlib.sha256(repr(found).encode()).hexdigest()
    return Listing(folder, tuple(entry[0] for entry in found), tuple(labels), stamp, tuple(others))


def images_below(folder: Path) -> list[Path]:
    """Return all files of a folder, and of those in it, that end as images do, sorted; none is opened.

    Raises:
        DataError: If a folder cannot be read or holds itself.
    """
    return [folder / name for name, _ in _walk(folder, "") if name.lower().endswith(EXTENSIONS)]


def what_is_left_out(folder: Path, listings: dict[str, Listing], classes: tuple[str, ...]) -> list[str]:
    """Return what the user must be told of a folder: what is not read, and classes that val or test lack."""
    notes = []
    if listings["train"].folder != folder and (names := sorted({*class_names(folder)} - {*SPLITS})):
        notes.append(f"{_some([f'{name}/' for name in names])} beside train/ not read: splits are {', '.join(SPLITS)}")
    others = [os.path.join(listing.folder, name) for listing in listings.values() for name in listing.others]
    if others:
        example = shown(min(others, key=lambda name: not _is_picture(name)))
        files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        notes.append(
            f"{files} left out, such as {example}: images lie in their class's folder and end in {', '.join(EXTENSIONS)}"
        )
    for split, listing in listings.items():
        filled = set(listing.labels)
        if lacking := [name for label, name in enumerate(classes) if label not in filled]:
            notes.append(f"{split}/ has no images of {_some(lacking)}: accuracies there are of the other classes")
    return notes


def check_classes(split: str, folder: Path, classes: tuple[str, ...]) -> None:
    """Refuse a split with a class that ``train/`` lacks.

    Raises:
        DataError: If there is one.
    """
    unknown = [name for name in class_names(folder) if name not in classes]
    if unknown:
        rule = f"Every class of {split}/ must be in train/ too"
        raise DataError(f"{rule}, but got {_some(unknown)} in {shown(folder)}.")


def check_filled(listings: dict[str, Listing], classes: tuple[str, ...]) -> None:
    """Refuse a split without images, and a class without training images.

    Raises:
        DataError: If there is one.
    """
    for split, listing in listings.items():
        check_not_empty(split, listing)
    filled = set(listings["train"].labels)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"Every class must have training images, but {_some(empty)} has none. {KNOWN_ENDINGS}")


def check_not_empty(split: str, listing: Listing) -> None:
    """Refuse a split without images.

    Raises:
        DataError: If it has none.
    """
    if not listing.files:
        rule = f"The {split} split must hold images in one folder for each class"
        raise DataError(f"{rule}, but {shown(listing.folder)} has none. {KNOWN_ENDINGS}")


def shown(path: str | Path) -> str:
    r"""Return a path on one line that any terminal can show.

    Example:
        >>> shown("two\nlines.png")
        'two\\nlines.png'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def unreadable(path: str | Path, error: Exception, what: str = "image") -> DataError:
    """Return the error of a file or folder that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    rule = f"Every {what} must be readable, but {shown(path)} is not"
    return DataError(f"{rule} ({shown(reason) or type(error).__name__}). Remove or replace it.")


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what a folder holds, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error, "folder of images") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _scan(folder: Path, prefix: str, others: list[str]) -> list[tuple[str, int, int]]:
    """Return relative path, size and modification time of the images in a folder and all below; add what else is there."""
    found: list[tuple[str, int, int]] = []
    for name, entry in _walk(folder, f"{prefix}/"):
        if name.lower().endswith(EXTENSIONS):
            found.append((name, *_size_and_time(entry)))
        else:
            others.append(name)
    return found


def _walk(folder: Path | str, prefix: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what lies in a folder and all below, and is no folder, by its relative path behind a prefix."""
    place = os.path.realpath(folder)
    if place in above:
        raise DataError(f"A folder must not hold itself, but {shown(folder)} is a link to {shown(place)}. Remove it.")
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        name = f"{prefix}{entry.name}"
        if _is_folder(entry):
            yield from _walk(entry.path, f"{name}/", (*above, place))
        else:
            yield name, entry


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        about = entry.stat()
    except OSError as error:  # a link that leads nowhere
        raise unreadable(entry.path, error) from error
    if not stat.S_ISREG(about.st_mode):  # to open it might wait for ever
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "none")
        raise DataError(f"Every image must be a regular file, but {shown(entry.path)} is {kind}. Remove it.")
    return about.st_size, about.st_mtime_ns


def _is_picture(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def _some(names: Sequence[str]) -> str:
    """Return names on one line, the first few of many."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return shown(", ".join(names[:_NAMED])) + rest
