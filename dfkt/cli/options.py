"""The command line's switches, in groups that commands share, and the configurations that they change."""

from __future__ import annotations

import argparse
import os
import re
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfkt.cli.numbers import number, whole
from dfkt.config import (
    KNOWN_SETS,
    PRETRAINED_OWN,
    CudaGraphs,
    DataConfig,
    NetworkConfig,
    Placement,
    Precision,
    TeacherConfig,
    TrainConfig,
    check_choice,
)
from dfkt.errors import ConfigError

FINE_TUNING_RATE = 0.01
"""Where a teacher's training begins with weights that know something already."""


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the switches that choose images."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        help="cifar10, cifar100, mnist, svhn, digits, or a folder with one sub-folder per class "
        "(default: the script's, or digits)",
    )
    group.add_argument("--data-root", help="where torchvision's sets are kept (default: ~/.cache/dfkt/data)")
    group.add_argument("--image-size", type=whole, help="resize images to this many pixels")
    group.add_argument(
        "--augment",
        help="crop (or resize), flip, separated by commas; none (default: the set's own; no folder is mirrored)",
    )
    group.add_argument("--padding", type=whole, help="pixels of zeros around an image before it is cropped")
    group.add_argument("--limit-train", type=whole, help="use at most so many training images")
    group.add_argument("--limit-test", type=whole, help="use at most so many test images")


def add_networks(parser: argparse.ArgumentParser, *, student: bool = True) -> None:
    """Add the switches that choose networks."""
    group = parser.add_argument_group("networks (resnetN, torchvision:NAME, timm:NAME or package.module:function)")
    for role, usual in (("teacher", "resnet26"), ("student", "resnet8"))[: 2 if student else 1]:
        group.add_argument(f"--{role}", help=f"the {role} network (default: the script's, or {usual})")
        group.add_argument(f"--{role}-width", type=number, help=f"multiplies the {role} ResNet's channels")
        group.add_argument(f"--{role}-taps", help="module paths of its taps, bottom to top, separated by commas")
    group.add_argument("--teacher-checkpoint", help="a state dict to use instead of training a teacher")
    group.add_argument(
        "--teacher-pretrained",
        nargs="?",
        const=PRETRAINED_OWN,
        metavar="FILE",
        help="begin the teacher's training with torchvision's or timm's own weights, or with a file's; the last layer is new "
        "where the classes are others",
    )
    group.add_argument(
        "--teacher-rate",
        type=number,
        help=f"learning rate at the start of its training (default: 0.1; {FINE_TUNING_RATE} with --teacher-pretrained)",
    )
    for moment, usual in (("mean", "0.485,0.456,0.406"), ("std", "0.229,0.224,0.225")):
        group.add_argument(
            f"--teacher-{moment}",
            help=f"{moment} by which the images of its weights were normalised, of images in 0..1: one number per channel, "
            f"such as {usual}, or one for all (default: a library's own, else the image set's)",
        )
    if student:
        group.add_argument("--teacher-epochs", type=number, help="epochs of the teacher's training")
    group.add_argument("--teacher-root", help="where trained teachers are kept (default: ~/.cache/dfkt/teachers)")


def add_training(parser: argparse.ArgumentParser, *, student: bool = True) -> None:
    """Add the switches of training; without a student, those that a teacher's training has."""
    group = parser.add_argument_group("training")
    if not student:
        group.add_argument(
            "--epochs", "--teacher-epochs", type=number, dest="teacher_epochs", help="of its training (default: 60)"
        )
    group.add_argument("--batch-size", type=whole, help="images per step, over all workers together (default: 128)")
    group.add_argument(
        "--precision", choices=typing.get_args(Precision), help="of the networks (default: bfloat16 where it is fast)"
    )
    if student:
        group.add_argument(
            "--epochs",
            type=number,
            help="of a student's whole run, flow stages counted in (default: the script's, or 60)",
        )
        group.add_argument(
            "--clip-norm", type=number, help="clip the gradient's norm in stages without a limit of their own"
        )


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the switches that say what a command's own process runs on; return their group."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument(
        "--threads",
        type=whole,
        help="CPU threads, which change the last bits (default: 1, as a study's --cpus-per-worker)",
    )
    return group


def add_cuda_graphs(group: argparse._ActionsContainer) -> None:
    """Add the switch that says how steps are launched on a GPU."""
    group.add_argument(
        "--cuda-graphs",
        choices=typing.get_args(CudaGraphs),
        help="record the steps of a run of one worker on a GPU, and replay them (default: auto: of resnetN and dfkt's methods)",
    )


def add_dry_run(group: argparse._ActionsContainer) -> None:
    """Add the switch that checks everything and trains nothing."""
    group.add_argument("--dry-run", action="store_true", help="check everything, say what would be trained, and end")


def updated(config: Any, **values: Any) -> Any:
    """Return a configuration with the values that were given."""
    given = {name: value for name, value in values.items() if value is not None}
    return replace(config, **given) if given else config


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a text, separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def split_numbers(switch: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers that a switch was given, separated by commas.

    Raises:
        ConfigError: If there are none, or one of them is none.
    """
    try:
        return None if text is None else tuple(number(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise ConfigError(f"`{switch}` takes numbers separated by commas, but got {text!r}.") from None


def absolute_path(path: str | None) -> str | None:
    """Return a path that means the same in every process on this machine; workers have working directories of their own."""
    if path == "":
        raise ConfigError("A path must not be empty.")
    if path is None:
        return None
    found = Path(os.path.expanduser(path)).absolute()
    return str(found.resolve() if ".." in found.parts else found)  # a folder counts by its name, which `..` is not


def host_path(path: str | None) -> str | None:
    """Return a path that each host reads for itself: one below ``~`` stays as it is, any other is made absolute."""
    return path if path is not None and (path.startswith("~") or "://" in path) else absolute_path(path)


def as_name(text: str) -> str:
    """Return a text as a part of a study's name: what such a name cannot hold becomes ``_``.

    Example:
        >>> as_name("my images-torchvision:resnet18")
        'my_images-torchvision_resnet18'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


def data_name(text: str) -> str:
    """Return what stands for ``--data`` in a study's name: an image set's name, or that of a folder."""
    return as_name(text if text in KNOWN_SETS else Path(absolute_path(text) or "").name)


def with_data(config: DataConfig, a: argparse.Namespace) -> DataConfig:
    """Return a configuration with the images that were chosen."""
    folder = bool(a.data) and os.path.isdir(os.path.expanduser(a.data)) and a.data not in KNOWN_SETS
    changed = updated(
        config,
        name=absolute_path(a.data) if folder else a.data,
        image_size=a.image_size,
        padding=a.padding,
        **read_augmentation(a.augment),
        limit_train=a.limit_train,
        limit_test=a.limit_test,
    )
    return typing.cast(DataConfig, changed)


def read_augmentation(text: str | None) -> dict[str, Any]:
    """Return the settings of images that ``--augment`` stands for.

    Example:
        >>> read_augmentation("crop,flip"), read_augmentation("none")
        ({'crop': 'padded', 'flip': True}, {'crop': 'none', 'flip': False})
    """
    if text is None:
        return {}
    names = split_names(text) or ()
    ok = names == ("none",) or (bool(names) and set(names) <= {"crop", "resize", "flip"})
    if not ok or {"crop", "resize"} <= set(names):
        raise ConfigError(f"`--augment` takes crop or resize, flip, separated by commas, or none; but got {text!r}.")
    crop = "padded" if "crop" in names else "resized" if "resize" in names else "none"
    return {"crop": crop, "flip": "flip" in names}


def with_network(config: NetworkConfig, a: argparse.Namespace, role: str) -> NetworkConfig:
    """Return a role's network with what was chosen."""
    name, width, taps = (getattr(a, f"{role}{suffix}") for suffix in ("", "_width", "_taps"))
    return typing.cast(NetworkConfig, updated(config, name=name, width=width, taps=split_names(taps)))


def with_teacher(config: TeacherConfig, a: argparse.Namespace) -> TeacherConfig:
    """Return a teacher with what was chosen."""
    train = updated(config.train, epochs=a.teacher_epochs, batch_size=a.batch_size, precision=a.precision)
    pretrained = a.teacher_pretrained
    fine = pretrained is not None and config.rate == TeacherConfig.rate
    changed = updated(
        config,
        network=with_network(config.network, a, "teacher"),
        train=train,
        checkpoint=absolute_path(a.teacher_checkpoint),
        pretrained=pretrained if pretrained == PRETRAINED_OWN else absolute_path(pretrained),
        rate=FINE_TUNING_RATE if fine and a.teacher_rate is None else a.teacher_rate,
        mean=split_numbers("--teacher-mean", a.teacher_mean),
        std=split_numbers("--teacher-std", a.teacher_std),
    )
    return typing.cast(TeacherConfig, changed)


def with_train(config: TrainConfig, a: argparse.Namespace) -> TrainConfig:
    """Return what stages share, with what was chosen."""
    changed = updated(
        config,
        epochs=a.epochs,
        batch_size=a.batch_size,
        precision=a.precision,
        clip_norm=a.clip_norm,
        sync_batch_norm=False if getattr(a, "no_sync_batch_norm", False) else None,
    )
    return typing.cast(TrainConfig, changed)


def with_choices(config: Any, a: argparse.Namespace) -> Any:
    """Return a run or a study with the images, networks and training that were chosen."""
    return replace(
        config,
        data=with_data(config.data, a),
        teacher=with_teacher(config.teacher, a),
        student=with_network(config.student, a, "student"),
        train=with_train(config.train, a),
    )


def read_placement(a: argparse.Namespace) -> Placement:
    """Return where things lie, and what a command that needs no cluster runs on; a study's runs are told by their driver."""
    placed = updated(
        Placement(),
        data_root=absolute_path(a.data_root),
        teacher_root=absolute_path(a.teacher_root),
        target_root=host_path(getattr(a, "target_root", None)),
        keep_targets=getattr(a, "keep_targets", None),
        checkpoint_every=getattr(a, "checkpoint_every", None),
        cuda_graphs=getattr(a, "cuda_graphs", None),
    )
    if hasattr(a, "device"):
        placed = updated(placed, device=read_device(a.device), threads=a.threads)
    return typing.cast(Placement, placed)


def read_device(text: str | None) -> str:
    """Return the device that was asked for, or a GPU if there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch

    count = torch.cuda.device_count()
    known = ("cpu", "cuda", *(f"cuda:{k}" for k in range(count))) if count else ("cpu",)
    if text is None:
        return "cuda" if count else "cpu"
    check_choice("device", text, known)
    return text
