"""Train a teacher, or find the one trained before, or take a user's own; a study keeps its one teacher beside its results.

A training is named by its recipe, in the folder for teachers of this machine; the teacher itself, once it is there, by
its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from dfkt.config import PRETRAINED_OWN, Placement, Precision, TeacherConfig, is_finite, key_dict, to_dict
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, one_line
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network, is_own, network_taps
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps, Tap
from dfkt.store.files import Storage
from dfkt.training.evaluate import evaluate
from dfkt.training.loop import Training
from dfkt.training.normalisation import renormalise, with_normalisation
from dfkt.training.optim import network_dtype
from dfkt.training.pretrained import load_pretrained
from dfkt.training.probe import probe, refusing
from dfkt.training.replay import replays
from dfkt.training.resume import resumed
from dfkt.training.state import STATE_FILE, hash_weights, load_state, load_weights, own_random, read_weights, save_state
from dfkt.training.threads import threads

WEIGHTS_FILE = "teacher.pt"
ABOUT_FILE = "teacher.json"
REMEDY = "Take the network that it was saved of (--teacher), trained for these classes and channels."
Log = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to teach; ``key`` names its weights. The network takes images by its own normalisation."""

    network: nn.Module
    key: str
    val_accuracy: float
    seconds: float | None = None
    """That its training took on this machine; ``None`` where that is not known."""


def recipe_key(config: TeacherConfig, data: ImageSet) -> str:
    """Return 12 hexadecimal digits that name a teacher's training by the settings and the images that it depends on."""
    settings = key_dict(replace(config, network=replace(config.network, taps=None)))
    settings["train"].pop("sync_batch_norm")  # a teacher is trained by one process
    if config.pretrained not in (None, PRETRAINED_OWN):  # a file: what it holds counts, not where it lies
        settings["pretrained"] = hash_weights(read_weights(str(config.pretrained)))
    settings["data"] = [data.checksum, len(data.train), data.padding, data.flip]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def find_teacher(
    config: TeacherConfig, data: ImageSet, placement: Placement, log: Log, folder: Storage | None = None
) -> Teacher:
    """Return the teacher that a configuration stands for: a study's own, a user's, or one trained before or now.

    Processes that ask for the same teacher at once wait for the one that trains it; an interrupted training goes on where it was.

    Args:
        config: The teacher's network and training, or a user's checkpoint.
        data: The image set, on the device that is to train.
        placement: Where trained teachers are kept, and the threads that train it: they change the last bits.
        log: Receives one line when the teacher is ready, one per epoch while it is trained, and a warning of one that
            knows little.
        folder: A study's: the weights there are its teacher, and a teacher found elsewhere is left there.

    Raises:
        CheckpointError: If weights cannot be read or do not fit, or a user's are not those that the study began with.
        ConfigError: If a user's mean or std does not fit the images' channels.
        StudyError: If the folder for teachers is not writable.
    """
    with threads(placement.threads):
        teacher = _find(config, data, placement, log, folder)
    if warning := warn_of_chance(config, teacher.val_accuracy, data.num_classes):
        log(warning)
    return teacher


def warn_of_chance(config: TeacherConfig, val_accuracy: float, classes: int) -> str:
    """Return a line on a teacher that does little better than chance, with what may help; empty for a better one.

    Little is less than three times chance, and less than a fifth of the way from chance to 100 %: 28 % of ten classes,
    60 % of two.

    Example:
        >>> warn_of_chance(TeacherConfig(), 0.27, 10)
        'teacher resnet26 is little better than chance, val 27.00 % of 10 classes: train it longer (--teacher-epochs)'
        >>> warn_of_chance(TeacherConfig(), 0.29, 10)
        ''
    """
    chance = 1 / classes
    if val_accuracy >= min(3 * chance, chance + 0.2 * (1 - chance)):
        return ""
    if config.checkpoint is None:
        remedy = "train it longer (--teacher-epochs)"
    elif config.mean is None:
        remedy = (
            "was it trained with another normalisation? Give --teacher-mean and --teacher-std. "
            "Or with the classes in another order, or other ones?"
        )
    else:
        remedy = "are --teacher-mean, --teacher-std and the order of the classes those of its training?"
    name, val = config.network.name, f"val {100 * val_accuracy:.2f} % of {classes} classes"
    return f"teacher {name} is little better than chance, {val}: {remedy}"


def _find(config: TeacherConfig, data: ImageSet, placement: Placement, log: Log, folder: Storage | None) -> Teacher:
    own = read_own(config, data) if config.checkpoint is not None else None
    if folder is not None and folder.exists(WEIGHTS_FILE):
        teacher = _rated(config, data, load_teacher(config, data, folder))
        if own is not None and hash_weights(own.state_dict()) != teacher.key:
            raise CheckpointError(
                f"The study's teacher must stay {teacher.key}, but {config.checkpoint} holds other weights. "
                "Take another --name, or leave --teacher-checkpoint out."
            )
        log(f"teacher {config.network.name}: val {100 * teacher.val_accuracy:.2f} %, the study's own")
        return teacher
    if own is not None:
        teacher = _rated(config, data, own)
        log(f"teacher {config.network.name} from {config.checkpoint}: val {100 * teacher.val_accuracy:.2f} %")
    else:
        teacher = _trained(config, data, placement, log)
    if folder is not None:
        save_state(folder, teacher.network.state_dict(), WEIGHTS_FILE)
    return teacher


def load_teacher(config: TeacherConfig, data: ImageSet, folder: Storage) -> nn.Module:
    """Return the network whose weights :func:`find_teacher` left in a folder.

    Raises:
        CheckpointError: If there are none, or they do not fit.
    """
    network = _build(config, data)
    weights = load_state(folder, WEIGHTS_FILE)
    if weights is None:
        raise CheckpointError(f"A teacher's weights must lie in {folder.path}/{WEIGHTS_FILE}, but there are none.")
    load_weights(network, weights, f"{folder.path}/{WEIGHTS_FILE}", config.network.name)
    return network


def read_own(config: TeacherConfig, data: ImageSet) -> nn.Module:
    """Return a user's teacher from ``config.checkpoint``, tried once.

    Raises:
        CheckpointError: If it cannot be read or does not fit.
        NetworkError: If it does not give logits for the images.
        ConfigError: If its mean or std does not fit the images' channels.
    """
    renormalise(config, data, config.train.precision)
    path = str(Path(os.path.expanduser(str(config.checkpoint))))
    network = _build(config, data)
    what = f"{config.network.name} for {data.num_classes} classes and {data.channels} channels"
    load_weights(network, read_weights(path), path, what, REMEDY)
    _try(config, data, network, learns=False)
    return network


def check_teacher(config: TeacherConfig, data: ImageSet, *, tapped: bool, precision: Precision) -> tuple[Tap, ...]:
    """Try a teacher's network as its training will, or a user's with its weights, then frozen; return its taps.

    Args:
        config: Network and training, or a user's checkpoint.
        data: The image set, on the device.
        tapped: Whether features are to be read at its taps.
        precision: Of the run in which it teaches.

    Raises:
        InputError: If it cannot be built, trained, read or cut, or a user's weights are none for it.
    """
    name, shape = config.network.name, (data.channels, *data.image_size)
    network = _begun(config, data) if config.checkpoint is None else read_own(config, data)
    names = network_taps(network, config.network) if tapped else ()
    if config.checkpoint is None:
        _try(config, data, network, learns=True)
    with refusing(name, "cannot be copied and frozen"):
        frozen = FrozenTeacher(network.to(network_dtype(precision)), names, shape)
    probe(frozen, name, data, precision, learns=False)
    return frozen.taps


def _try(config: TeacherConfig, data: ImageSet, network: nn.Module, *, learns: bool) -> None:
    """Run a network as its training will, or once as a user's that is trained."""
    whole = TappedNetwork(network, (), (data.channels, *data.image_size))
    name = config.network.name + ("" if learns else f" with the weights of {config.checkpoint}")
    probe(whole, name, data, config.train.precision, learns=learns)


def _trained(config: TeacherConfig, data: ImageSet, placement: Placement, log: Log) -> Teacher:
    """Return the teacher that this machine has trained by the recipe, trained now if there is none or it is damaged."""
    name = config.network.name.replace(":", "_")
    storage = Storage(Path(os.path.expanduser(placement.teacher_root)) / f"{name}-{recipe_key(config, data)}")
    if not storage.exists(WEIGHTS_FILE):
        _try(config, data, _begun(config, data), learns=True)
    storage.check_writable()
    with FileLock(Path(storage.path) / ".lock"):
        found = _kept(config, data, storage, log)
        teacher = found or _train(config, data, placement, storage, log)
    how = "found" if found else f"trained in {teacher.seconds:.0f} s, kept"
    log(f"teacher {config.network.name}: val {100 * teacher.val_accuracy:.2f} %, {how} in {storage.path}")
    return teacher


def _kept(config: TeacherConfig, data: ImageSet, storage: Storage, log: Log) -> Teacher | None:
    """Return a trained teacher; ``None`` if it is not whole."""
    text = storage.read(ABOUT_FILE)
    if text is None or not storage.exists(WEIGHTS_FILE):
        return None
    try:
        about = json.loads(text)
        if not all(is_finite(about[name]) and about[name] >= 0 for name in ("val_accuracy", "seconds")):
            raise CheckpointError(f"{ABOUT_FILE} must hold val_accuracy and seconds, numbers >= 0.")
        network = load_teacher(config, data, storage)
    except (CheckpointError, LookupError, TypeError, ValueError) as error:
        log(f"the teacher in {storage.path} is damaged, so it is trained again ({one_line(error)})")
        return None
    return Teacher(network, hash_weights(network.state_dict()), about["val_accuracy"], about["seconds"])


def _rated(config: TeacherConfig, data: ImageSet, network: nn.Module) -> Teacher:
    accuracy, loss = evaluate(with_normalisation(config, data, network), data, data.val, config.train.precision)
    if not math.isfinite(loss):
        raise CheckpointError(f"Teacher {config.network.name} gives nan or inf for images of val, so it cannot teach.")
    return Teacher(network, hash_weights(network.state_dict()), accuracy)


def _build(config: TeacherConfig, data: ImageSet) -> nn.Module:
    device = data.device
    with own_random(config.train.seed, device):
        network = build_network(config.network, num_classes=data.num_classes, in_channels=data.channels)
    dtype = network_dtype(config.train.precision)
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _begun(config: TeacherConfig, data: ImageSet) -> nn.Module:
    """Return a network as its training begins: new, or with the weights that it is given."""
    network = _build(config, data)
    if config.pretrained is not None:
        load_pretrained(network, config, num_classes=data.num_classes, in_channels=data.channels)
    return network


def _train(config: TeacherConfig, data: ImageSet, placement: Placement, storage: Storage, log: Log) -> Teacher:
    """Train from scratch; the description is written last, so that its presence means the teacher is whole."""
    schedule = Scratch(rate=config.rate).schedule(config.train.epochs, StudentTaps(0, ()))
    replay = replays(placement.cuda_graphs, data.device, 1, ours=is_own(config.network.name))

    def make() -> Training:
        learning = with_normalisation(config, data, _begun(config, data))
        student = TappedNetwork(learning, (), (data.channels, *data.image_size))
        return Training(schedule, student, None, data, config.train, replay=replay)

    training, _ = resumed(make, storage, log=log)
    network = training.student.network
    if renormalise(config, data, config.train.precision) is not None:
        network = network.get_submodule("1")
    began = time.perf_counter() - training.device_seconds
    log(f"training teacher {config.network.name}, {config.train.epochs:g} epochs")
    for record in training.run():
        save_state(storage, training.state())
        log(
            f"  teacher epoch {record['epoch']:.0f}/{config.train.epochs:g}: loss {record['loss']:.3f}, "
            f"val {100 * record['val_accuracy']:.2f} %, {record['images_per_second']:.0f} images/s"
        )
    save_state(storage, network.state_dict(), WEIGHTS_FILE)
    teacher = _rated(config, data, network)  # one that goes on may have no epoch left
    seconds = time.perf_counter() - began
    about = to_dict(config) | {"val_accuracy": teacher.val_accuracy, "seconds": seconds}
    storage.write(ABOUT_FILE, json.dumps(about, indent=1).encode())
    storage.delete(STATE_FILE)
    return replace(teacher, seconds=seconds)
