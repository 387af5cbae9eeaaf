"""What a student says of image files: decoded as a folder of training images is, answered in batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfkt.data.decode import decode_image
from dfkt.data.listing import KNOWN_ENDINGS, images_below, shown, unreadable
from dfkt.errors import CheckpointError, DataError
from dfkt.students.exported import Exported, as_input
from dfkt.students.package import Student

BATCH = 64


@dataclass(frozen=True)
class Answer:
    """What is said of one image file.

    Attributes:
        path: The file.
        classes: The likeliest ones, the likeliest first.
        probabilities: Theirs (softmax of the logits).
        error: Why there is no answer.
    """

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: DataError | None = None


def find_images(places: Sequence[str]) -> list[Path]:
    """Return the image files that some files and folders stand for, in their order; whether they can be read shows later.

    Args:
        places: A file is taken whatever its ending; of a folder, and of those in it, what ends as images do.

    Raises:
        DataError: If that is none, or a folder cannot be read.
    """
    found: list[Path] = []
    for place in (Path(os.path.expanduser(place)) for place in places):
        found += images_below(place) if os.path.isdir(place) else [place]
    if not any(os.path.lexists(path) for path in found):
        named = shown(found[0] if found else places[0])
        what = "there is no such file" if found else "that folder has none"
        raise DataError(f"There must be an image, but {named}: {what}. {KNOWN_ENDINGS}")
    return found


def predict(student: Student | Exported, paths: Sequence[Path], top: int = 5) -> Iterator[Answer]:
    """Yield a student's answer for every image file, in their order; what cannot be decoded has an error instead.

    Args:
        student: Its own folder's, or an exported one.
        paths: Image files: grey or colour, of any size.
        top: Classes that are told of each, at most.

    Raises:
        CheckpointError: If the student takes images that no file can be made into.
    """
    channels, height, width = student.input_size
    if height != width or channels not in (1, 3):
        raise CheckpointError(
            f"A student of image files must take square images in grey or colour, but takes {list(student.input_size)}."
        )

    def decode(path: Path) -> NDArray[np.uint8] | DataError:
        try:
            if not os.path.isfile(path):  # a pipe would be waited for
                raise unreadable(path, ValueError("no file" if os.path.exists(path) else "there is none"))
            return decode_image(path, size=height, channels=channels)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of large images and odd tags
        for few in (paths[start : start + BATCH] for start in range(0, len(paths), BATCH)):
            yield from _answers(student, few, list(pool.map(decode, few)), top)


def _answers(
    student: Student | Exported, paths: Sequence[Path], decoded: Sequence[NDArray[np.uint8] | DataError], top: int
) -> Iterator[Answer]:
    images = [image for image in decoded if not isinstance(image, DataError)]
    if images:
        with torch.inference_mode():
            logits = student(as_input(torch.from_numpy(np.stack(images))))
            values, places = logits.double().softmax(1).topk(min(top, len(student.classes)))
        rows = iter(zip(values.tolist(), places.tolist(), strict=True))
    for path, image in zip(paths, decoded, strict=True):
        if isinstance(image, DataError):
            yield Answer(path, error=image)
        else:
            shares, labels = next(rows)
            yield Answer(path, tuple(student.classes[label] for label in labels), tuple(shares))
