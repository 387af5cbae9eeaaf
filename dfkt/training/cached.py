"""What one process keeps from run to run: the latest image set, test split and teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dfkt.config import DataConfig, Placement, TeacherConfig, config_key
from dfkt.data.image_set import ImageSet, Split
from dfkt.data.load import load_data, load_test
from dfkt.networks.build import network_taps
from dfkt.networks.tapped import FrozenTeacher
from dfkt.store.files import Storage
from dfkt.training.normalisation import renormalise
from dfkt.training.optim import network_dtype
from dfkt.training.teacher import load_teacher


class _Cache:
    """The latest value of each kind."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """Return the kept value of this kind, made anew when its key is another."""
        if self.entries.get(kind, ("",))[0] != key:
            self.entries.pop(kind, None)  # before the new one is made: both might not fit
            self.entries[kind] = (key, make())
        return self.entries[kind][1]


_CACHE = _Cache()


def images_for(config: DataConfig, placement: Placement) -> ImageSet:
    """Return an image set on the placement's device, kept for the next run of this process."""
    key = f"{config} {placement.data_root} {placement.device}"
    data: ImageSet = _CACHE.get("images", key, lambda: load_data(config, placement.data_root).to(placement.device))
    return data


def test_images_for(config: DataConfig, placement: Placement) -> Split:
    """Return the test split on the placement's device, kept likewise; this opens it."""
    data = images_for(config, placement)
    key = f"{config} {placement.data_root} {placement.device}"
    make = lambda: load_test(config, placement.data_root, data).to(placement.device)  # noqa: E731
    split: Split = _CACHE.get("test", key, make)
    return split


def teacher_for(config: TeacherConfig, data: ImageSet, folder: str, *, tapped: bool, precision: Any) -> FrozenTeacher:
    """Return the frozen teacher of a folder on the images' device, kept for the next run of this process.

    Args:
        config: Its network, and the images that it was trained with.
        data: The image set, on the device.
        folder: Where its weights lie.
        tapped: Whether features are read at its taps.
        precision: Of the run.
    """

    def make() -> FrozenTeacher:
        network = load_teacher(config, data, Storage(folder)).to(network_dtype(precision))
        names = network_taps(network, config.network) if tapped else ()
        return FrozenTeacher(network, names, data.shape, renormalise(config, data, precision))

    key = f"{config_key(config)} {folder} {data.checksum} {data.device} {tapped} {precision}"
    teacher: FrozenTeacher = _CACHE.get("teacher", key, make)
    return teacher
