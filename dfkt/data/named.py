"""Sets known by name: torchvision's CIFAR-10, CIFAR-100, MNIST and SVHN, and scikit-learn's bundled digits.

They are read into arrays with their usual augmentation. torchvision's are downloaded when missing, by one process at a
time; files that are already there are used without asking the network.
"""

from __future__ import annotations

import gzip
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from sklearn.datasets import load_digits
from torchvision import datasets

from dfkt.data.source import Arrays, Source
from dfkt.errors import DataError

_DIGITS = tuple("0123456789")
_TORCHVISION: dict[str, tuple[str, Callable[..., Any], int, bool]] = {
    "cifar10": ("CIFAR-10", datasets.CIFAR10, 4, True),
    "cifar100": ("CIFAR-100", datasets.CIFAR100, 4, True),
    "mnist": ("MNIST", datasets.MNIST, 2, False),
    "svhn": ("SVHN", datasets.SVHN, 4, False),
}
"""Title, constructor, default padding and default flip of torchvision's sets."""
_UNREADABLE = (RuntimeError, OSError, ValueError, AssertionError, EOFError, KeyError, zlib.error)


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
    return Source(title, classes, _arrays(name, found), None, owns_test=True, padding=padding, flip=flip)


def read_known_test(name: str, root: Path) -> Arrays | None:
    """Return the test images of a set of :data:`dfkt.config.KNOWN_SETS`, or ``None`` if it has no such split.

    Raises:
        DataError: As for :func:`read_known`.
    """
    return None if name == "digits" else _arrays(name, _open_known(name, root, "test"))


def _arrays(name: str, found: Any) -> Arrays:
    """Return views of the arrays that torchvision holds, channels last."""
    images = np.asarray(found.data)
    if name == "svhn":
        return images.transpose(0, 2, 3, 1), np.asarray(found.labels, dtype=np.int64)
    return images[..., None] if images.ndim == 3 else images, np.asarray(found.targets, dtype=np.int64)


def _read_digits() -> Arrays:
    """Return scikit-learn's 1797 grey 8x8 digits, grey values 0..16 scaled to 0..255."""
    bunch = load_digits()
    grey = np.floor(bunch.images * (255 / 16) + 0.5).astype(np.uint8)[..., None]
    return grey, bunch.target.astype(np.int64)


def _open_known(name: str, root: Path, split: str) -> Any:
    """Open one of torchvision's sets; of several processes at once only one downloads it."""
    title, make, _, _ = _TORCHVISION[name]
    which: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    with warnings.catch_warnings():
        # CIFAR's files were pickled by a NumPy that wrote dtype flags as 0 and 1.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        try:
            return make(root, **which, download=False)
        except _UNREADABLE:
            pass  # missing, or another process is writing it
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):
                if name == "mnist":
                    _unpack(root / "MNIST" / "raw")
                return make(root, **which, download=True)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            remedy = "Give a folder with one sub-folder per class with --data FOLDER, or --data digits."
            raise DataError(f"{title} could be neither read from {root} nor downloaded ({reason}). {remedy}") from error


def _unpack(raw: Path) -> None:
    """Unpack MNIST's files where only the ``.gz`` are there; torchvision would download them again."""
    for packed in raw.glob("*-ubyte.gz"):
        if not packed.with_suffix("").exists():
            part = packed.with_suffix(".part")
            with gzip.open(packed) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(part, packed.with_suffix(""))
