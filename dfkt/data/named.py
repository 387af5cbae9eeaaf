"""Sets known by name: torchvision's CIFAR-10, CIFAR-100, MNIST and SVHN, and scikit-learn's bundled digits.

They are read into arrays with their usual augmentation. torchvision's are downloaded when missing, by one process at a
time; files that are already there are used without asking the network. Both libraries are imported where a set is read: together
they take longer than all else that a command imports.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import shutil
import socket
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfkt.data.listing import shown
from dfkt.data.locked import locked
from dfkt.data.source import Arrays, Source
from dfkt.errors import DataError, one_line

_DIGITS = tuple("0123456789")
_TORCHVISION: dict[str, tuple[str, str, int, bool]] = {
    "cifar10": ("CIFAR-10", "CIFAR10", 4, True),
    "cifar100": ("CIFAR-100", "CIFAR100", 4, True),
    "mnist": ("MNIST", "MNIST", 2, False),
    "svhn": ("SVHN", "SVHN", 4, False),
}
"""Title, class, default padding and default flip of torchvision's sets."""
PATIENCE = 30.0
"""Seconds without an answer after which a download fails."""


def read_known(name: str, root: Path) -> Source:
    """Return the training images of a set of :data:`dfkt.config.KNOWN_SETS`; ``root`` is torchvision's folder.

    Raises:
        DataError: If it is not in ``root`` and cannot be downloaded.
    """
    if name == "digits":
        return Source("digits", _DIGITS, _read_digits(), None, owns_test=False, padding=1, flip=False)
    title, _, padding, flip = _TORCHVISION[name]
    found = _open_known(name, root, "train")
    classes = tuple(found.classes) if name.startswith("cifar") else _DIGITS
    return Source(title, classes, _arrays(name, found, root), None, owns_test=True, padding=padding, flip=flip)


def read_known_test(name: str, root: Path) -> Arrays | None:
    """Return the test images of a set of :data:`dfkt.config.KNOWN_SETS`, or ``None`` if it has no such split.

    Raises:
        DataError: As for :func:`read_known`.
    """
    return None if name == "digits" else _arrays(name, _open_known(name, root, "test"), root)


def check_known_test(name: str, root: Path) -> None:
    """Refuse a test split that :func:`read_known_test` could not read; one that is not there yet is downloaded.

    CIFAR's files were all compared with their checksums when the training images were read.

    Raises:
        DataError: As for :func:`read_known`.
    """
    if (name == "mnist" and not _whole_mnist(root)) or (name == "svhn" and not _whole_svhn(root)):
        read_known_test(name, root)


def _whole_mnist(root: Path) -> bool:
    raw = root / "MNIST" / "raw"
    images, labels = (_idx_shape(raw / f"t10k-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
    return len(images) == 3 and labels == images[:1]


def _idx_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of the bytes in a file of MNIST's format; empty if it has not the length that its header tells."""
    try:
        with path.open("rb") as file:
            dimensions = file.read(4)[3]
            shape = struct.unpack(f">{dimensions}i", file.read(4 * dimensions))
            length = os.fstat(file.fileno()).st_size
    except (OSError, IndexError, struct.error):
        return ()
    return shape if length == 4 + 4 * dimensions + math.prod(shape) else ()


def _whole_svhn(root: Path) -> bool:
    from torchvision.datasets import svhn

    _, file, checksum = svhn.SVHN.split_list["test"]
    with contextlib.suppress(OSError):
        return bool(svhn.check_integrity(root / file, checksum))
    return False


def _arrays(name: str, found: Any, root: Path) -> Arrays:
    """Return views of the arrays that torchvision holds, channels last."""
    images = np.asarray(found.data)
    if name == "svhn":
        images, labels = images.transpose(0, 2, 3, 1), np.asarray(found.labels, dtype=np.int64)
    else:
        images = images[..., None] if images.ndim == 3 else images
        labels = np.asarray(found.targets, dtype=np.int64)
    if labels.shape != images.shape[:1]:
        have = f"{len(images)} images and {labels.size} labels"
        raise DataError(f"{_TORCHVISION[name][0]} in {shown(root)} must have a label for each image, but has {have}.")
    return images, labels


def _read_digits() -> Arrays:
    """Return scikit-learn's 1797 grey 8x8 digits, grey values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.floor(bunch.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    return grey, bunch.target.astype(np.int64)


def _open_known(name: str, root: Path, split: str) -> Any:
    """Open one of torchvision's sets; of several processes at once only one downloads it."""
    from torchvision import datasets

    title, kind, _, _ = _TORCHVISION[name]
    make = getattr(datasets, kind)
    which: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    with warnings.catch_warnings():
        # CIFAR's files were pickled by a NumPy that wrote dtype flags as 0 and 1.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        try:
            return make(root, **which, download=False)
        except Exception as error:  # unpickling raises nearly anything; or it is missing, or being written just now
            found = error
        try:
            with locked(root, f".{name}.lock"), _patience():
                if name == "mnist":
                    found = _unpack(root / "MNIST" / "raw") or found
                return make(root, **which, download=True)
        except Exception as error:
            read = "" if "download=True" in str(found) else f" ({one_line(found)})"
            remedy = (
                "Remove what is damaged there, give a folder with one sub-folder per class with --data FOLDER, "
                "or --data digits."
            )
            raise DataError(
                f"{title} could be neither read from {shown(root)}{read} nor downloaded ({one_line(error)}). {remedy}"
            ) from error


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Let new connections of this process fail when nothing has come for :data:`PATIENCE` seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack(raw: Path) -> Exception | None:
    """Unpack MNIST's files where only the ``.gz`` are there; torchvision would download them again.

    Returns:
        Why the last damaged one could not be unpacked, if any is: that one torchvision is left to download.
    """
    damaged = None
    for packed in raw.glob("*-ubyte.gz"):
        if packed.with_suffix("").exists():
            continue
        part = packed.with_suffix(".part")
        try:
            with gzip.open(packed) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            if not _idx_shape(part):
                raise EOFError("not whole")
            os.replace(part, packed.with_suffix(""))
        except (OSError, EOFError, zlib.error) as error:
            damaged = ValueError(f"{packed.name}: {error}")
        finally:
            part.unlink(missing_ok=True)
    return damaged
