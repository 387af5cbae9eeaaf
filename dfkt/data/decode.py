"""Image files become arrays of one size: shorter side resized, centre cropped, grey or colour."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dfkt.errors import DataError

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
CHUNK = 64


def decode_all(paths: Sequence[Path], *, size: int, channels: int | None = None, title: str = "") -> NDArray[np.uint8]:
    """Return images as ``[N, size, size, C]``, decoded in parallel with a progress bar where someone is watching.

    Args:
        paths: The image files.
        size: Height and width of the result.
        channels: 1 or 3; ``None`` gives 1 if every image is grey, else 3.
        title: What the progress bar calls them.

    Raises:
        DataError: If a file cannot be decoded.
    """
    count = len(paths)
    images = np.empty((count, size, size, channels or 3), dtype=np.uint8)
    grey = np.zeros(count, dtype=np.bool_)

    def decode(start: int) -> int:
        stop = min(start + CHUNK, count)
        for i in range(start, stop):
            image = decode_image(paths[i], size=size, channels=channels)
            images[i], grey[i] = image, image.shape[2] == 1
        return stop - start

    bar = tqdm(total=count, desc=f"decoding {title}", unit="img", disable=None)
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


def shorter_side(path: Path) -> int:
    """Return the smaller of an image file's height and width in pixels, without decoding it.

    Raises:
        DataError: If it is no readable image.
    """
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception as error:  # as in decode_image
        raise _broken(path, error) from error


def _convert(image: Image.Image, *, grey: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL would clip them at 255
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if grey else "RGB")


def _broken(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"Every image must be readable, but {path} is not ({reason}). Remove or replace it.")
