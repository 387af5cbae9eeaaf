"""A student left as a package at the end of its run: weights, description, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dfkt.config import Precision, key_dict
from dfkt.store.files import Storage
from dfkt.store.origin import package_version
from dfkt.students.card import card
from dfkt.students.cost import count, weight_bytes
from dfkt.students.package import CARD_FILE, CONFIG_FILE, FORMAT, WEIGHTS_FILE, read_config
from dfkt.training.optim import autocast
from dfkt.training.run import Trained
from dfkt.training.state import hash_weights

_VERSIONS = ("python", "dfkt", "torch", "torchvision", "safetensors")
OF_TEACHER = ("key", "val_accuracy", "test_accuracy", "parameters", "macs", "bytes")
"""What a package tells of a teacher: what names its weights, how good it is, what it costs."""


def keep_student(storage: Storage, trained: Trained, teacher: Mapping[str, Any] | None = None) -> None:
    """Leave a student at the end of its run as a package.

    Args:
        storage: Its folder; other files in it stay.
        trained: The student, and the run that trained it.
        teacher: What is known of its teacher beside its settings, by the names of :data:`OF_TEACHER`; others are left out.

    Raises:
        NetworkError: If its state holds more than tensors.
    """
    weights = weight_bytes(trained.network.state_dict())
    config = _describe(trained, teacher, len(weights))
    storage.delete(CONFIG_FILE)  # an earlier one does not describe these weights
    storage.write(WEIGHTS_FILE, weights)
    _write(storage, config)


@dataclass(frozen=True)
class Keeper:
    """:func:`keep_student` with what is known of the teacher, as it travels with a job; copies are equal."""

    teacher: Mapping[str, Any] | None = None

    def __call__(self, storage: Storage, trained: Trained) -> None:
        """Leave a student as a package."""
        keep_student(storage, trained, self.teacher)


def note_test(storage: Storage, test_accuracy: float) -> None:
    """Note the test accuracy of a student that was kept without it.

    Raises:
        CheckpointError: If the folder holds no package.
    """
    config = read_config(storage)
    _write(storage, config | {"dfkt": config["dfkt"] | {"test_accuracy": test_accuracy}})


def _write(storage: Storage, config: Mapping[str, Any]) -> None:
    storage.write(CARD_FILE, card(config).encode())
    storage.write(CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


def _describe(trained: Trained, teacher: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    """Return a package's ``config.json``: what timm has a name for by that name, all else in ``dfkt``."""
    run, data, network = trained.config, trained.data, trained.network
    names = key_dict(run)  # without the folders of this machine
    known = {name: value for name, value in (teacher or {}).items() if name in OF_TEACHER}
    classifier = _classifier(network, data.num_classes)
    own = {
        "format": FORMAT,
        "network": names["student"],
        "weights": hash_weights(network.state_dict()),
        "precision": _used(run.train.precision, data.mean.device),
        "val_accuracy": trained.val_accuracy,
        "test_accuracy": trained.test_accuracy,
        **asdict(count(network, data.shape)),
        "bytes": size,  # of the file
        "teacher": {"settings": names["teacher"], **known} if run.method.taught else None,
        "method": names["method"],
        "described": run.method.describe(),
        "data": {"title": data.title, **names["data"]},
        "train": names["train"],
        "seed": run.train.seed,
        "key": run.key,
        "device": data.mean.device.type,
        "versions": {name: package_version(name) for name in _VERSIONS},
    }
    given = {
        "input_size": list(data.shape),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
        "num_classes": data.num_classes,
        "first_conv": next((path for path, m in network.named_modules() if isinstance(m, nn.Conv2d)), None),
        "classifier": classifier[0],
    }
    head = {"architecture": run.student.name.removeprefix("timm:"), "num_classes": data.num_classes}
    head |= {"num_features": classifier[1], "label_names": list(data.classes)}
    head |= {"model_args": {"width": run.student.width}} if run.student.width != 1 else {}
    return head | {"pretrained_cfg": given, "dfkt": own}


def _classifier(network: nn.Module, classes: int) -> tuple[str | None, int | None]:
    """Return path and inputs of the linear layer that gives the logits, as far as that can be told."""
    found = [
        (path, m.in_features)
        for path, m in network.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == classes
    ]
    return found[-1] if found else (None, None)


def _used(precision: Precision, device: torch.device) -> Precision:
    """Return in which precision a run was evaluated on a device, also where that was left to the device."""
    if precision == "float64":
        return precision
    with autocast(precision, device):
        return "bfloat16" if torch.is_autocast_enabled(device.type) else "float32"
