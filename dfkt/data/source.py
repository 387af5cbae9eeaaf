"""What the readers of image sets give: arrays as they lie on disk, not yet split, resized or padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
