"""A student as a folder that can be used anywhere, without its study and its images.

::

    model.safetensors   the weights
    config.json         everything else, by the names of timm's config.json where that has one; the rest stands in "dfkt"
    README.md           the same for readers: a model card of the Hugging Face hub (:mod:`dfkt.students.card`)

Each file is written whole, ``config.json`` last: a folder holds a student when that is there. Here it is read;
:mod:`dfkt.students.keep` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfkt.config import NetworkConfig, Precision, check_choice, check_rule, from_dict, is_finite
from dfkt.errors import CheckpointError, ConfigError, DataError, one_line
from dfkt.networks.build import build_network
from dfkt.store.files import Storage, readable
from dfkt.students.cost import Shape
from dfkt.training.optim import autocast, computes_bfloat16, network_dtype
from dfkt.training.state import hash_weights, load_weights, own_random

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = PACKAGE_FILES = ("model.safetensors", "config.json", "README.md")
FORMAT = 1
"""Of the entry ``dfkt`` in ``config.json``."""
_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class About:
    """What is read of ``config.json`` to use a student."""

    network: NetworkConfig
    classes: tuple[str, ...]
    input_size: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    weights: str
    """What names its weights."""


class Student(nn.Module):
    """A trained student in evaluation mode: takes images as they are, and returns a logit for each of ``classes``.

    It computes as it was evaluated: in bfloat16 where it was and the device computes that, else in float32.

    Attributes:
        network: The bare network; takes what :meth:`normalise` returns.
        classes: Name of every logit.
        input_size: Channels, height and width of the images that it was trained on.
        precision: ``float32``, ``bfloat16`` or ``float64``.
        config: What its ``config.json`` says.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, about: About, config: Mapping[str, Any], precision: Precision | None = None
    ) -> None:
        super().__init__()
        self.network, self.config = network, dict(config)
        self.precision, self._anywhere = precision or about.precision, precision is not None
        self.classes, self.input_size = about.classes, about.input_size
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (about.mean, about.std))
        self.register_buffer("scale", (1 / (255 * std))[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, classes]``, float32 (float64 of a network in float64).

        Args:
            images: ``[B, C, H, W]``, uint8, or floating point numbers in 0..1.

        Raises:
            DataError: If they are of another shape or type.
        """
        dtype = network_dtype(self.precision)
        bfloat16 = self.precision == "bfloat16" and (self._anywhere or _is_fast(images.device.type))
        with autocast("bfloat16", images.device) if bfloat16 else nullcontext():
            logits: Tensor = self.network(self.normalise(images).to(dtype))
        return logits.to(dtype)

    def normalise(self, images: Tensor) -> Tensor:
        """Return images as the network takes them: float32, of mean 0 and std 1, channels last in memory.

        Whole numbers over 255 give the very bits that :meth:`dfkt.data.image_set.ImageSet.normalise` gives.

        Args:
            images: As :meth:`forward` takes them.

        Raises:
            DataError: As there.
        """
        channels = self.input_size[0]
        if images.ndim != 4 or images.shape[1] != channels:
            raise DataError(f"Images must be [B, {channels}, H, W], but got {list(images.shape)}.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise DataError(f"Images must be uint8, or floating point numbers in 0..1, but got {images.dtype}.")
        whole = images.float() if images.dtype == torch.uint8 else images.float() * 255
        return (whole * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


def load_student(folder: str | os.PathLike[str] | Storage, precision: Precision | None = None) -> Student:
    """Return a trained student from its folder: ``results/NAME/students/ARM-seedN`` of a study, or ``--out`` of ``distill``.

    Nothing but the folder is read; a network of one's own must be importable. The 1x1 convolutions that made its channels agree
    with the teacher's were thrown away and are not in it.

    Args:
        folder: Local, or any that pyarrow.fs takes.
        precision: ``float32`` or another to compute in, whatever the device; ``None`` computes as it was evaluated, as far as
            that is fast.

    Returns:
        The student on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If a file is absent or damaged, of another version, or they do not fit each other.
        NetworkError: If the network is a function that cannot be imported.
        ConfigError: If there is no such precision.
    """
    check_choice("precision", precision, (None, *_PRECISIONS))
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    config = read_config(storage)
    about = _read(f"{storage.path}/{CONFIG_FILE}", config)
    with own_random(0, torch.device("cpu")):
        network = build_network(about.network, num_classes=len(about.classes), in_channels=about.input_size[0])
    network = network.to(network_dtype(precision or about.precision), memory_format=torch.channels_last)  # type: ignore[call-overload]
    where = f"{storage.path}/{WEIGHTS_FILE}"
    weights = read_weights(storage)
    load_weights(network, weights, where, about.network.name)
    if hash_weights(weights) != about.weights:
        raise CheckpointError(f"{where} is not the student that {CONFIG_FILE} describes: it was damaged or exchanged.")
    return Student(network, about, config, precision).eval()


def read_config(storage: Storage) -> dict[str, Any]:
    """Return what a package's ``config.json`` says.

    Raises:
        CheckpointError: If there is none, or it is damaged, or not one of dfkt's of this version.
    """
    with readable(storage):
        text = storage.read(CONFIG_FILE)
    where = f"{storage.path}/{CONFIG_FILE}"
    if text is None:
        raise CheckpointError(
            f"A student's folder must hold {CONFIG_FILE} and {WEIGHTS_FILE}, but {storage.path} has no {CONFIG_FILE}. "
            "Take one that a study names: results/NAME/students/ARM-seedN."
        )
    try:
        config = json.loads(text)
        own = config["dfkt"]["format"]
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read as a student's: {one_line(error)}.") from error
    if own != FORMAT:
        raise CheckpointError(
            f"A student's format must be {FORMAT}, but {where} has {own!r:.40}. Use the dfkt that wrote it."
        )
    return dict(config)


def read_weights(storage: Storage) -> dict[str, Tensor]:
    """Return a package's weights, on the CPU.

    Raises:
        CheckpointError: If there are none, or the file is damaged.
    """
    with readable(storage):
        data = storage.read(WEIGHTS_FILE)
    if data is None:
        raise CheckpointError(
            f"A student's folder must hold {WEIGHTS_FILE}, but {storage.path} has none beside {CONFIG_FILE}."
        )
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{storage.path}/{WEIGHTS_FILE} is damaged: {one_line(error)}.") from error


def _read(where: str, config: Mapping[str, Any]) -> About:
    """Return what a ``config.json`` says that is needed, checked.

    Raises:
        CheckpointError: If an entry is missing or of another kind.
    """
    try:
        own, given = config["dfkt"], config["pretrained_cfg"]
        names, size, moments = config["label_names"], given["input_size"], (given["mean"], given["std"])
        ok = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
        check_rule(ok, "label_names are names", label_names=names)
        ok = isinstance(size, list) and len(size) == 3 and all(type(side) is int and side > 0 for side in size)
        check_rule(ok, "input_size is channels, height and width", input_size=size)
        ok = all(isinstance(values, list) and len(values) == size[0] for values in moments)
        ok = ok and all(is_finite(value) for values in moments for value in values) and min(moments[1]) > 0
        check_rule(ok, "mean and std have a number for each channel, std > 0", mean=moments[0], std=moments[1])
        check_choice("precision", own["precision"], _PRECISIONS)
        check_rule(isinstance(own["weights"], str), "weights is a text", weights=own["weights"])
        network = from_dict(NetworkConfig, own["network"])
        mean, std = (tuple(map(float, values)) for values in moments)
        return About(network, tuple(names), (size[0], size[1], size[2]), mean, std, own["precision"], own["weights"])
    except (ArithmeticError, ConfigError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read as a student's: {one_line(error)}.") from error


@cache
def _is_fast(device: str) -> bool:
    """Whether a kind of device computes bfloat16 itself."""
    return computes_bfloat16(device)
