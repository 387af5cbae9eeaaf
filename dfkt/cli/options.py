"""The command line's switches, in groups that commands share, and the configurations that they change."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dfkt.config import (
    KNOWN_SETS,
    DataConfig,
    NetworkConfig,
    Placement,
    Precision,
    TeacherConfig,
    TrainConfig,
    build,
    check_rule,
    to_dict,
)
from dfkt.errors import ConfigError
from dfkt.methods.base import Method
from dfkt.methods.space import Range, Space


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
    group.add_argument("--precision", choices=typing.get_args(Precision), help="of the networks (default: auto)")
    group.add_argument(
        "--clip-norm", type=float, help="clip the gradient's norm in stages without a limit of their own"
    )
    group.add_argument(
        "--no-sync-batch-norm", action="store_true", help="several workers normalise each by its own share of a batch"
    )


def add_settings(parser: argparse._ActionsContainer, what: str) -> None:
    """Add the switch that sets fields of a method."""
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", dest="settings",
        help=f"settings of {what}, such as rate=0.05 rounds=2 pattern=dense-2 (docs/methods.md lists them)",
    )  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the switches that say what one run spans."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--workers-per-run", type=int, help="data-parallel workers of one run (default: 1)")
    group.add_argument("--cpus-per-worker", type=int, help="CPUs of a worker (default: 1)")
    group.add_argument(
        "--gpus-per-worker", type=float, help="GPUs of a worker; a fraction shares one (default: 1 if there are any)"
    )
    group.add_argument("--checkpoint-every", type=int, help="epochs between checkpoints (default: 1)")
    group.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, or this machine)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the switches that say what a command's own process runs on."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument("--threads", type=int, help="CPU threads (default: 1, as in a study)")
    group.add_argument("--checkpoint-every", type=int, help="epochs between checkpoints (default: 1)")


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
        image_size=a.image_size,
        limit_train=a.limit_train,
        limit_test=a.limit_test,
    )
    return typing.cast(DataConfig, changed)


def with_network(config: NetworkConfig, a: argparse.Namespace, role: str) -> NetworkConfig:
    """Return a role's network with what was chosen."""
    name, width, taps = (getattr(a, f"{role}{suffix}") for suffix in ("", "_width", "_taps"))
    return typing.cast(NetworkConfig, updated(config, name=name, width=width, taps=split_names(taps)))


def with_teacher(config: TeacherConfig, a: argparse.Namespace) -> TeacherConfig:
    """Return a teacher with what was chosen."""
    train = updated(config.train, epochs=a.teacher_epochs, batch_size=a.batch_size, precision=a.precision)
    network, checkpoint = with_network(config.network, a, "teacher"), absolute_path(a.teacher_checkpoint)
    return typing.cast(TeacherConfig, updated(config, network=network, train=train, checkpoint=checkpoint))


def with_train(config: TrainConfig, a: argparse.Namespace) -> TrainConfig:
    """Return what stages share, with what was chosen."""
    changed = updated(
        config,
        epochs=a.epochs,
        batch_size=a.batch_size,
        precision=a.precision,
        clip_norm=a.clip_norm,
        sync_batch_norm=False if a.no_sync_batch_norm else None,
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
    """Return where things lie."""
    placed = updated(
        Placement(),
        data_root=absolute_path(a.data_root),
        teacher_root=absolute_path(a.teacher_root),
        checkpoint_every=a.checkpoint_every,
    )
    if hasattr(a, "device"):
        placed = updated(placed, device=a.device or _own_device(), threads=a.threads)
    return typing.cast(Placement, placed)


def _own_device() -> str:
    """Return what a command that needs no cluster runs on; a study's runs are told by their driver."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read_workers(a: argparse.Namespace) -> Any:
    """Return what one run spans."""
    from dfkt.study.driver import Workers

    for name in ("workers_per_run", "cpus_per_worker", "gpus_per_worker"):
        value = getattr(a, name)
        ok = value is None or value > 0 or (name == "gpus_per_worker" and value == 0)
        check_rule(ok, f"{name} > 0", **{name: value})
    return Workers(count=a.workers_per_run or 1, cpus=a.cpus_per_worker or 1, gpus=a.gpus_per_worker)


def with_settings(method: Method, given: Iterable[str]) -> Method:
    """Return a method with settings given as ``NAME=VALUE``.

    Raises:
        ConfigError: If there is no such setting, or a value does not fit it.
    """
    return with_values(method, dict(parse_setting(type(method), text) for text in given))


def with_values(method: Method, values: dict[str, Any]) -> Method:
    """Return a method with some settings changed, their values as JSON has them."""
    settings = {name: value for name, value in to_dict(method).items() if name != "name"}
    return build(type(method), settings | values)


def parse_setting(kind: type[Method], text: str) -> tuple[str, Any]:
    """Return name and value of one of a method's settings.

    Raises:
        ConfigError: If there is no such setting, or the value is of another type.

    Example:
        >>> from dfkt.methods.dfkt import Dfkt
        >>> parse_setting(Dfkt, "rounds=2"), parse_setting(Dfkt, "pattern=dense-2"), parse_setting(Dfkt, "freeze_below=true")
        (('rounds', 2), ('pattern', 'dense-2'), ('freeze_below', True))
    """
    name, equals, value = text.partition("=")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    if not equals or name not in known:
        raise ConfigError(f"Settings of {kind.name} are given as NAME=VALUE with {', '.join(known)}; but got {text!r}.")
    if hints[name] is str or typing.get_origin(hints[name]) is typing.Literal:
        return name, value
    try:
        parsed = json.loads({"none": "null"}.get(value.lower(), value.lower()))
    except ValueError:
        parsed = value
    wanted = {bool: bool, int: int}.get(hints[name], object)
    numeric = hints[name] in (float, int)
    ok = isinstance(parsed, wanted) and (not numeric or (isinstance(parsed, (int, float)) and parsed is not True))
    if not ok or isinstance(parsed, str) or (hints[name] is not bool and isinstance(parsed, bool)):
        raise ConfigError(f"`{name}` of {kind.name} must be {hints[name]}, but got {value!r}.")
    return name, float(parsed) if hints[name] is float else parsed


def parse_space(given: Iterable[str]) -> Space:
    """Return what is searched otherwise: ``NAME=LOW..HIGH``, ``NAME=log:LOW..HIGH`` or ``NAME=A,B,C``.

    Example:
        >>> parse_space(["rounds=1", "flow_rate=log:0.05..0.2"]).changes
        {'rounds': (1,), 'flow_rate': Range(low=0.05, high=0.2, log=True)}
    """
    return Space(dict(_parse_narrowed(text) for text in given))


def _parse_narrowed(text: str) -> tuple[str, Range | tuple[Any, ...]]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise ConfigError(
            f"A search is narrowed by NAME=LOW..HIGH, NAME=log:LOW..HIGH or NAME=A,B,…; but got {text!r}."
        )
    low, dots, high = value.removeprefix("log:").partition("..")
    if not dots:
        return name, tuple(_value(word) for word in value.split(","))
    try:
        return name, Range(float(low), float(high), log=value.startswith("log:"))
    except ValueError as error:
        raise ConfigError(f"A range is LOW..HIGH in numbers, but got {text!r}.") from error


def _value(word: str) -> Any:
    """Return a number, a truth value, or the word itself."""
    try:
        return json.loads(word.lower())
    except ValueError:
        return word.strip()
