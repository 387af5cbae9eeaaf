"""Students that are kept: weights, and beside them all that is needed to use these elsewhere, without their study."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkt.config import NetworkConfig, check_rule, from_dict, is_finite, to_dict
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, ConfigError, one_line
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.training.state import load_state, load_weights, own_random, save_state

STUDENT_FILE = "student.pt"
ABOUT_FILE = "student.json"


@dataclass(frozen=True, eq=False)
class Student:
    """A trained student, ready to classify: ``network((images - mean) / std)`` are the logits of ``[B, C, H, W]`` in 0..1."""

    network: nn.Module
    """In evaluation mode, float32, on the CPU."""
    classes: tuple[str, ...]
    """Name of every logit."""
    mean: Tensor
    """``[C, 1, 1]``, of its training images in units of 0..1."""
    std: Tensor
    """As ``mean``."""
    image_size: tuple[int, int]
    """Height and width of its training images."""


def keep_student(storage: Storage, config: NetworkConfig, network: nn.Module, data: ImageSet) -> None:
    """Leave a student's weights in a folder, and what :func:`load_student` must know of it."""
    about = {
        "network": to_dict(config),
        "classes": list(data.classes),
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
        "image_size": list(data.image_size),
    }
    storage.write(ABOUT_FILE, json.dumps(about, indent=1).encode())
    save_state(storage, network.state_dict(), STUDENT_FILE)


def load_student(folder: str | os.PathLike[str]) -> Student:
    """Return a trained student from its folder: ``results/NAME/students/ARM-seedN`` of a study, or ``--out`` of ``distill``.

    The 1x1 convolutions that made its channels agree with the teacher's were thrown away and are not in it.

    Args:
        folder: Local, or any that pyarrow.fs takes; ``student.pt`` and ``student.json`` in it are all that is read.

    Raises:
        CheckpointError: If one of the two files is absent or damaged, or they do not fit each other.
        NetworkError: If the network is a function that cannot be imported.
    """
    storage = Storage(folder)
    text, weights = storage.read(ABOUT_FILE), load_state(storage, STUDENT_FILE)
    if text is None or weights is None:
        raise CheckpointError(
            f"A student's folder must hold {STUDENT_FILE} and {ABOUT_FILE}, but {storage.path} does not. "
            "Take one that a study names: results/NAME/students/ARM-seedN."
        )
    try:
        config, classes, mean, std, size = _read_about(json.loads(text))
    except (ArithmeticError, ConfigError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{storage.path}/{ABOUT_FILE} cannot be read: {one_line(error)}.") from error
    with own_random(0, torch.device("cpu")):
        network = build_network(config, num_classes=len(classes), in_channels=len(mean))
    load_weights(network, weights, f"{storage.path}/{STUDENT_FILE}", config.name)
    return Student(network.eval(), classes, mean, std, size)


def _read_about(about: Any) -> tuple[NetworkConfig, tuple[str, ...], Tensor, Tensor, tuple[int, int]]:
    """Return what :func:`keep_student` wrote of a student; what is missing or of another kind raises."""
    names, size, moments = about["classes"], about["image_size"], (about["mean"], about["std"])
    check_rule(isinstance(names, list) and len(names) > 0, "classes are names", classes=names)
    ok = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    check_rule(ok, "image_size is height and width", image_size=size)
    ok = all(isinstance(values, list) and len(values) == len(moments[0]) > 0 for values in moments)
    ok = ok and all(is_finite(value) for values in moments for value in values) and min(moments[1]) > 0
    check_rule(ok, "mean and std have a number for each channel, std > 0", mean=moments[0], std=moments[1])
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in moments)
    return from_dict(NetworkConfig, about["network"]), tuple(map(str, names)), mean, std, (size[0], size[1])
