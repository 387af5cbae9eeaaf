"""Image files become arrays of one size: shorter side resized, centre cropped, grey or colour."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dfkt.data.listing import unreadable

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
LONGEST = 100
"""Most times that an image's longer side may be its shorter one: of a longer one the centre shows nothing."""
CHUNK = 64
_SCALED = ("PNG", "PPM")
"""Formats whose pixels of 32 bits hold the 16 bits of the file."""


def decode_all(
    paths: Sequence[Path], file: BinaryIO, *, size: int, channels: int | None = None, title: str = ""
) -> None:
    """Decode images into a file as NumPy keeps arrays (``.npy``), ``[N, size, size, C]``: all need not fit into memory.

    It is done in parallel, with a progress bar where someone is watching.

    Args:
        paths: The image files.
        file: Empty; what is written lies in it in any order until the end.
        size: Height and width of the result.
        channels: 1 or 3; ``None`` gives 1 if every image is grey, else 3.
        title: What the progress bar calls them.

    Raises:
        DataError: If an image cannot be decoded.
        OSError: If the file takes no more.
    """
    if channels is None:
        channels = 1 if all(_headers(paths, lambda image: image.mode in GREY_MODES, title)) else 3
    shape, each = (len(paths), size, size, channels), size * size * channels
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.flush()
    first = file.tell()

    def decode(start: int) -> int:
        chosen = paths[start : start + CHUNK]
        images = np.stack([decode_image(path, size=size, channels=channels) for path in chosen])
        left, place = memoryview(images.tobytes()), first + start * each
        while left:
            written = os.pwrite(file.fileno(), left, place)
            left, place = left[written:], place + written
        return len(chosen)

    _in_parallel(decode, len(paths), f"decoding {title}")


def shorter_sides(paths: Sequence[Path], *, title: str = "") -> list[int]:
    """Return the smaller of height and width in pixels of image files, read from their headers: nothing is decoded.

    Raises:
        DataError: If a file is no image that :func:`decode_all` could take, as far as its header tells.
    """
    return _headers(paths, lambda image: min(image.size), title)


def _headers(paths: Sequence[Path], read: Callable[[Image.Image], Any], title: str) -> list[Any]:
    """Return what is read of every image's header."""
    found: list[Any] = [None] * len(paths)

    def look(start: int) -> int:
        stop = min(start + CHUNK, len(paths))
        for i in range(start, stop):
            with _opened(paths[i]) as image:
                found[i] = read(image)
        return stop - start

    _in_parallel(look, len(paths), f"checking {title}")
    return found


def decode_image(path: Path, *, size: int, channels: int | None = None) -> NDArray[np.uint8]:
    """Return one image as ``[size, size, C]``: shorter side resized, centre cropped.

    Raises:
        DataError: If the file cannot be decoded.
    """
    with _opened(path) as opened:
        image = _convert(opened, grey=opened.mode in GREY_MODES if channels is None else channels == 1)
        short = min(image.size)
        if short != size:
            width, height = (max(size, round(side * size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image)[top : top + size, left : left + size].reshape(size, size, -1)


def _in_parallel(work: Callable[[int], int], count: int, title: str) -> None:
    """Call ``work`` with the first of every :data:`CHUNK` of images, in threads: PIL decodes without holding the GIL."""
    bar = tqdm(total=count, desc=title, unit="img", disable=None if count > CHUNK else True)
    with warnings.catch_warnings(), bar, ThreadPool(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # PIL's, of large images and odd tags
        for done in pool.imap_unordered(work, range(0, count, CHUNK)):
            bar.update(done)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file whose header is in order; whatever fails as long as it is open is told of the file."""
    try:
        with Image.open(path) as image:
            _check_header(image)
            yield image
    except UnidentifiedImageError as error:
        raise unreadable(path, ValueError("no known kind of image")) from error
    except Exception as error:  # PIL's decoders raise nearly anything on broken files
        raise unreadable(path, error) from error


def _check_header(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in _SCALED):
        raise ValueError("pixels of 32 bits have no scale that is known; 8 and 16 bits have")
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels; one side may be {LONGEST} times as long as the other")


def _convert(image: Image.Image, *, grey: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL would clip them at 255
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if grey else "RGB")
