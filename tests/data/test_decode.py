"""Decoding image files: sizes, modes, depths, and what cannot be read."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_image
from numpy.typing import NDArray
from PIL import Image

from dfkt.data.decode import decode_all, decode_image, shorter_sides
from dfkt.errors import DataError


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "YCbCr"])
def test_other_modes_become_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.png" if mode in ("RGBA", "P") else "x.jpg")
    write_image(path, mode=mode)
    assert decode_image(path, size=8).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_modes_stay_grey(tmp_path: Path, mode: str) -> None:
    write_image(tmp_path / "x.png", mode=mode)
    assert decode_image(tmp_path / "x.png", size=8).shape == (8, 8, 1)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
def test_channels_that_are_asked_for_are_given(tmp_path: Path, mode: str, channels: int) -> None:
    write_image(tmp_path / "x.png", mode=mode)
    assert decode_image(tmp_path / "x.png", size=8, channels=channels).shape == (8, 8, channels)


def test_a_transparent_palette_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    assert decode_image(tmp_path / "x.png", size=8)[0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", size=8)[0, 0].tolist() == [0x80]


def test_the_middle_is_cut_out_of_a_longer_side(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", size=(12, 6))
    assert np.array_equal(decode_image(tmp_path / "x.png", size=6), np.asarray(Image.open(tmp_path / "x.png"))[:, 3:9])
    assert decode_image(tmp_path / "x.png", size=3).shape == (3, 3, 3)
    assert shorter_sides([tmp_path / "x.png"]) == [6]


def decoded(paths: list[Path], folder: Path, *, size: int) -> NDArray[np.uint8]:
    """Return what is decoded into a file of a folder."""
    with (folder / "images.npy").open("wb") as file:
        decode_all(paths, file, size=size)
    return np.asarray(np.load(folder / "images.npy"))


def test_images_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(130)]
    for i, path in enumerate(paths):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(path)
    assert decoded(paths, tmp_path, size=2)[:, 0, 0, 0].tolist() == list(range(130))


@pytest.mark.parametrize(("modes", "channels"), [("LL", 1), ("LR", 3)])
def test_one_colour_image_makes_three_channels(tmp_path: Path, modes: str, channels: int) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, mode in zip(paths, modes, strict=True):
        write_image(path, mode="RGB" if mode == "R" else mode)
    images = decoded(paths, tmp_path, size=8)
    assert images.shape == (2, 8, 8, channels)
    assert (images[0, ..., 0] == images[0, ..., -1]).all()


@pytest.mark.parametrize("content", [b"", b"text"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for read in (lambda path: decode_image(path, size=8), lambda path: shorter_sides([path])):
        with pytest.raises(DataError, match=r"x\.png is not .*Remove or replace it"):
            read(tmp_path / "x.png")
