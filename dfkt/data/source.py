"""What the readers of image sets give: arrays as they lie on disk, not yet split, resized or padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfkt.errors import DataError

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images ``[N, H, W, C]``, perhaps mapped from a file or not contiguous, and labels ``[N]`` of one split."""


@dataclass(frozen=True)
class Source:
    """What a set has for training, and its usual augmentation."""

    title: str
    classes: tuple[str, ...]
    train: Arrays
    val: Arrays | None
    """``None`` where the set has no split of that name."""
    owns_test: bool
    """Whether the set has a test split of its own; it is read by another call."""
    padding: int
    flip: bool
    notes: tuple[str, ...] = ()


def blank(count: int, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Return ``[N, H, W, C]`` of zeros, which cost nothing until they are written.

    Raises:
        DataError: If there is not so much memory.
    """
    try:
        return np.zeros((count, height, width, channels), dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        remedy = "Lower image_size or limit_train."
        raise DataError(f"All images must fit into memory, but {count} of {height}x{width} do not. {remedy}") from error
