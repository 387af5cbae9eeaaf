"""Train a teacher, or find the one trained before, or take a user's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from dfkt.training.state import STATE_FILE, load_state, load_weights, read_weights, save_state
from dfkt.config import RunConfig, TaskConfig, TeacherConfig, to_dict
from dfkt.data.load import ImageSet
from dfkt.errors import CheckpointError
from dfkt.methods.builders import build_schedule
from dfkt.networks.build import build_network, network_taps
from dfkt.store.files import Storage
from dfkt.networks.tapped import TappedNetwork
from dfkt.training.loop import Training, evaluate

WEIGHTS_FILE = "teacher.pt"
ABOUT_FILE = "teacher.json"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to teach."""

    network: nn.Module
    key: str
    val_accuracy: float
    about: dict[str, Any]


def teacher_key(config: TeacherConfig, data: ImageSet) -> str:
    """Return 12 hexadecimal digits that name a teacher by its settings and by the images it learns from."""
    train = data.train
    settings = to_dict(config) | {"checkpoint": None, "root": None}
    settings["data"] = [
        zlib.crc32(train.images.cpu().numpy().data),
        zlib.crc32(train.labels.cpu().numpy().data),
        len(train),
        data.padding,
        data.flip,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def find_teacher(config: TeacherConfig, data: ImageSet, log: Log) -> Teacher:
    """Return the teacher that a configuration stands for, trained now unless it was trained before.

    Processes that ask for the same teacher at once wait for the one that trains it; an interrupted training goes on where it was.

    Args:
        config: The teacher's network and training, or a user's checkpoint.
        data: The image set, on the device that is to train.
        log: Receives one line when the teacher is ready, and one per epoch while it is trained.

    Raises:
        CheckpointError: If a user's checkpoint cannot be read or does not fit.
        StudyError: If the folder for teachers is not writable.
    """
    if config.checkpoint is not None:
        return _users_own(config, data, log)
    key = teacher_key(config, data)
    fresh = _build(config, data)
    folder = Path(config.root).expanduser() / f"{config.network.name.replace(':', '_')}-{key}"
    Storage(folder).check_writable()
    with FileLock(folder / ".lock"):
        found = (folder / ABOUT_FILE).exists()
        if not found:
            _train(config, data, fresh, Storage(folder), log)
        about = json.loads((folder / ABOUT_FILE).read_text())
    network = load_teacher(config, data, Storage(folder))
    how = "found" if found else f"trained in {about['seconds']:.0f} s, kept"
    log(f"teacher {config.network.name}: val {100 * about['val_accuracy']:.2f} %, {how} in {folder}")
    return Teacher(network, key, about["val_accuracy"], about)


def load_teacher(config: TeacherConfig, data: ImageSet, folder: Storage) -> nn.Module:
    """Return the teacher whose weights :func:`publish_teacher` left in a folder.

    Raises:
        CheckpointError: If there are none, or they do not fit.
    """
    network = _build(config, data)
    weights = load_state(folder, WEIGHTS_FILE)
    if weights is None:
        raise CheckpointError(f"A teacher's weights must lie in {folder.path}/{WEIGHTS_FILE}, but there are none.")
    load_weights(network, weights, f"{folder.path}/{WEIGHTS_FILE}", config.network.name)
    return network


def publish_teacher(teacher: Teacher, folder: Storage) -> None:
    """Leave a teacher's weights in a folder where every worker finds them."""
    if not folder.exists(WEIGHTS_FILE):
        save_state(folder, teacher.network.state_dict(), WEIGHTS_FILE)


def check_checkpoint(config: TeacherConfig, data: ImageSet) -> None:
    """Raise :class:`CheckpointError` if a user's checkpoint cannot be read or does not fit; does nothing without one."""
    if config.checkpoint is not None:
        path = str(Path(config.checkpoint).expanduser())
        load_weights(_build(config, data), read_weights(path), path, _describe(config, data))


def _users_own(config: TeacherConfig, data: ImageSet, log: Log) -> Teacher:
    path = Path(str(config.checkpoint)).expanduser()
    network = _build(config, data)
    load_weights(network, read_weights(str(path)), str(path), _describe(config, data))
    accuracy, _ = evaluate(network, data, data.val, config.train)
    log(f"teacher {config.network.name} from {path}: val {100 * accuracy:.2f} %")
    key = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Teacher(network, key, accuracy, {"checkpoint": str(path), "val_accuracy": accuracy})


def _describe(config: TeacherConfig, data: ImageSet) -> str:
    return f"{config.network.name} for {data.num_classes} classes and {data.channels} channels"


def _build(config: TeacherConfig, data: ImageSet) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        network = build_network(config.network, num_classes=data.num_classes, in_channels=data.channels)
    return network.to(data.train.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _train(config: TeacherConfig, data: ImageSet, network: nn.Module, storage: Storage, log: Log) -> None:
    """Train from scratch; the description is written last, so that its presence means the teacher is whole."""
    run = RunConfig(method="scratch", task=TaskConfig(optimizer=config.optimizer), train=config.train)
    schedule = build_schedule(run, 0, ())
    names = network_taps(network, config.network)
    student = TappedNetwork(network, names, (data.channels, *data.image_size))
    training = Training(schedule, student, None, data, config.train)
    state = load_state(storage)
    if state is not None:
        training.load(state)
    began = time.perf_counter() - (state["device_seconds"] if state else 0.0)
    log(f"training teacher {config.network.name}, {config.train.epochs:g} epochs")
    for record in training.run():
        save_state(storage, training.state())
        log(
            f"  teacher epoch {record['epoch']:.0f}/{config.train.epochs:g}: loss {record['loss']:.3f}, "
            f"val {100 * record['val_accuracy']:.2f} %, {record['images_per_second']:.0f} images/s"
        )
    save_state(storage, network.state_dict(), WEIGHTS_FILE)
    accuracy, _ = evaluate(network, data, data.val, config.train)  # a training that goes on may have no epoch left
    about = dataclasses.asdict(config) | {"val_accuracy": accuracy, "seconds": time.perf_counter() - began}
    storage.write(ABOUT_FILE, json.dumps(about, indent=1).encode())
    storage.delete(STATE_FILE)
