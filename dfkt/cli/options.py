"""The command line's switches, in groups that commands share, and the configurations that they change."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfkt.config import KNOWN_SETS, DataConfig, NetworkConfig, RunConfig, TeacherConfig
from dfkt.errors import ConfigError


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the switches that choose images."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", help="cifar10, cifar100, mnist, svhn, digits, or a folder with one sub-folder per class"
    )
    group.add_argument("--data-root", help="where torchvision's sets are kept (default: ~/.cache/dfkt/data)")
    group.add_argument("--image-size", type=int, help="resize images to this many pixels")
    group.add_argument("--limit-train", type=int, help="use at most so many training images")
    group.add_argument("--limit-test", type=int, help="use at most so many test images")


def add_networks(parser: argparse.ArgumentParser, *, student: bool = True) -> None:
    """Add the switches that choose networks."""
    group = parser.add_argument_group("networks (resnetN, torchvision:NAME or package.module:function)")
    for role in ("teacher", "student") if student else ("teacher",):
        group.add_argument(f"--{role}", help=f"the {role} network")
        group.add_argument(f"--{role}-width", type=float, help=f"multiplies the {role} ResNet's channels")
        group.add_argument(f"--{role}-taps", help="module paths of its taps, bottom to top, separated by commas")
    group.add_argument("--teacher-checkpoint", help="a state dict to use instead of training a teacher")
    group.add_argument("--teacher-epochs", type=float, help="epochs of the teacher's training")
    group.add_argument("--teacher-root", help="where trained teachers are kept (default: ~/.cache/dfkt/teachers)")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the switches of training."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=float, help="of a student's whole run, flow stages counted in (default: the script's, or 60)"
    )
    group.add_argument("--batch-size", type=int, help="images per step, over all workers together (default: 128)")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="mixed precision (default: auto)")
    group.add_argument("--compile", action="store_true", default=None, help="run the student through torch.compile")
    group.add_argument("--clip-norm", type=float, help="clip the gradient's norm in the task stage (flow stages: 1)")


def add_workers(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the switches that say what one run spans; ``name`` is that of the number of workers."""
    group = parser.add_argument_group("hardware")
    group.add_argument(name, type=int, dest="workers", help="data-parallel workers of one run (default: 1)")
    group.add_argument("--cpus-per-worker", type=int, help="CPUs of a worker (default: 1)")
    group.add_argument(
        "--gpus-per-worker", type=float, help="GPUs of a worker; a fraction shares one (default: 1 if there are any)"
    )
    group.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, or this machine)")


def updated(config: Any, **values: Any) -> Any:
    """Return a configuration with the values that were given."""
    given = {name: value for name, value in values.items() if value is not None}
    return replace(config, **given) if given else config


def split_names(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a text, separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def absolute_path(path: str | None) -> str | None:
    """Return a path that means the same in every process on this machine; workers have working directories of their own."""
    if path == "":
        raise ConfigError("A path must not be empty.")
    return None if path is None else str(Path(path).expanduser().absolute())


def with_data(config: DataConfig, a: argparse.Namespace) -> DataConfig:
    """Return a configuration with the images that were chosen."""
    folder = bool(a.data) and Path(a.data).expanduser().is_dir() and a.data not in KNOWN_SETS
    changed = updated(
        config,
        name=absolute_path(a.data) if folder else a.data,
        root=absolute_path(a.data_root),
        image_size=a.image_size,
        limit_train=a.limit_train,
        limit_test=a.limit_test,
    )
    assert isinstance(changed, DataConfig)
    return changed


def with_network(config: NetworkConfig, a: argparse.Namespace, role: str) -> NetworkConfig:
    """Return a role's network with what was chosen."""
    name, width, taps = (getattr(a, f"{role}{suffix}") for suffix in ("", "_width", "_taps"))
    changed = updated(config, name=name, width=width, taps=split_names(taps))
    assert isinstance(changed, NetworkConfig)
    return changed


def with_teacher(config: TeacherConfig, a: argparse.Namespace) -> TeacherConfig:
    """Return a teacher with what was chosen."""
    train = updated(config.train, epochs=a.teacher_epochs, batch_size=a.batch_size, precision=a.precision)
    network = with_network(config.network, a, "teacher")
    changed = updated(
        config,
        network=network,
        train=train,
        checkpoint=absolute_path(a.teacher_checkpoint),
        root=absolute_path(a.teacher_root),
    )
    assert isinstance(changed, TeacherConfig)
    return changed


def with_run(config: RunConfig, a: argparse.Namespace) -> RunConfig:
    """Return a run with what was chosen."""
    train = updated(
        config.train,
        epochs=a.epochs,
        batch_size=a.batch_size,
        precision=a.precision,
        compile=a.compile,
        clip_norm=a.clip_norm,
    )
    return replace(
        config,
        data=with_data(config.data, a),
        teacher=with_teacher(config.teacher, a),
        student=with_network(config.student, a, "student"),
        train=train,
    )


def read_workers(a: argparse.Namespace) -> Any:
    """Return what one run spans."""
    from dfkt.study.driver import Workers

    for name in ("workers", "cpus_per_worker", "gpus_per_worker"):
        value = getattr(a, name)
        if value is not None and not value > 0 and not (name == "gpus_per_worker" and value == 0):
            raise ConfigError(f"`{name} > 0` must hold, but got {name}={value!r}.")
    return Workers(count=a.workers or 1, cpus=a.cpus_per_worker or 1, gpus=a.gpus_per_worker)
