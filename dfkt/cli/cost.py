"""``python -m dfkt cost``: what networks and students cost, side by side: size, operations, and time for an image."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dfkt.cli.boundary import say
from dfkt.cli.numbers import number, whole
from dfkt.cli.options import add_device, read_device
from dfkt.config import NetworkConfig, Precision, check_rule, from_dict
from dfkt.errors import CheckpointError, ConfigError, InputError, one_line, tell
from dfkt.store.files import Storage, readable
from dfkt.store.origin import environment
from dfkt.store.study_file import STUDY_FILE
from dfkt.store.study_store import Study, read_study
from dfkt.students.cost import Answer, Cost, Shape, count, fresh, measure
from dfkt.students.exported import EXPORTS, Exported, open_exported
from dfkt.students.package import CONFIG_FILE, WEIGHTS_FILE, load_student
from dfkt.training.optim import autocast
from dfkt.training.threads import threads

HELP = "what networks cost: parameters, operations, MiB, and milliseconds for an image"
BATCHES = (1, 64)
"""Images at a time: one that is waited for, and many."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A network that is measured, and what is known of it before; an exported one takes its images on the CPU alone."""

    network: nn.Module | Exported
    shape: Shape
    cost: Cost


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument(
        "networks",
        nargs="+",
        metavar="NAME|FOLDER",
        help="resnetN, torchvision:NAME, timm:NAME or package.module:function; a student's folder, with what it was exported to; "
        "a study's: its teacher and best student",
    )
    group = parser.add_argument_group("networks that are named")
    group.add_argument("--image-size", type=whole, default=32, help="height and width in pixels (default: 32)")
    group.add_argument("--channels", type=whole, default=3, help="of an image (default: 3)")
    group.add_argument("--classes", type=whole, default=10, help="number of logits (default: 10)")
    add_measuring(parser)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the switches that say how time is measured."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    group.add_argument(
        "--seconds", type=number, default=2.0, help="for each network and batch size (default: 2); 0 measures no time"
    )
    add_device(parser)


def run(a: argparse.Namespace) -> int:
    """Measure and print."""
    from dfkt.analysis.tables import column_notes, cost_cells, text_table

    for name in ("image_size", "channels", "classes"):
        check_rule(getattr(a, name) >= 1, f"{name} >= 1", **{name: getattr(a, name)})
    measuring = Measuring.of(a)
    found = [one for text in a.networks for one in contenders(text, a)]
    table = cost_cells(measuring.costs(found))
    say(f"{text_table(table)}\n\n{column_notes(['MACs'])}")
    if measuring.seconds:
        say(measuring.describe())
    return 0


@dataclass(frozen=True)
class Measuring:
    """How time is measured, as :func:`add_measuring` asks."""

    seconds: float
    threads: int
    device: torch.device
    precision: Precision

    @classmethod
    def of(cls, a: argparse.Namespace) -> Measuring:
        """Return what the switches say.

        Raises:
            ConfigError: If one is outside its rule, or there is no such device.
        """
        check_rule(a.seconds >= 0, "seconds >= 0", seconds=a.seconds)
        given = 1 if a.threads is None else a.threads
        check_rule(given >= 1, "threads >= 1", threads=given)
        return cls(a.seconds, given, torch.device(read_device(a.device)), a.precision)

    def costs(self, found: list[Contender]) -> list[Cost]:
        """Return the costs of some networks, with the time that each takes where it is measured at all."""
        if not self.seconds:
            return [one.cost for one in found]
        with threads(self.threads):
            return timed(found, self.device, self.precision, self.seconds)

    def describe(self) -> str:
        """Return on what and how time was measured, in a sentence."""
        cpu = f"{environment()['hardware']['cpu']}, {self.threads} thread{'' if self.threads == 1 else 's'}"
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        how = self.precision if self.precision == "float32" else f"{self.precision} (files of `export`: float32)"
        return f"Time: median and quartiles over up to 200 forward passes, networks in turns, {how} on {where}."


def contenders(text: str, a: argparse.Namespace) -> list[Contender]:
    """Return the networks that a word of the command line stands for.

    Raises:
        InputError: If it is neither a network nor the folder of a student or study.
    """
    storage = Storage(text) if "/" in text or ":" not in text else None
    if storage is not None:
        with readable(storage):
            if storage.exists(STUDY_FILE):
                return of_study(storage, a.threads or 1)
            if storage.exists(CONFIG_FILE):
                return _of_package(storage, threads=a.threads or 1)
        if "/" in text:
            raise CheckpointError(
                f"A folder whose cost is asked for must hold a student ({CONFIG_FILE}) or a study ({STUDY_FILE}), "
                f"but {storage.path} holds neither."
            )
    shape = (a.channels, a.image_size, a.image_size)
    return [_named(NetworkConfig(name=text), text, a.classes, shape)]


def timed(found: list[Contender], device: torch.device, precision: Precision, seconds: float) -> list[Cost]:
    """Return the costs of some networks with the time that each takes, measured in turns; exported ones on the CPU alone.

    Raises:
        ConfigError: If one of them takes no images of its size.
    """
    answers: dict[int, tuple[Answer, Shape]] = {}
    for k, one in enumerate(found):
        if isinstance(one.network, nn.Module):
            network = one.network.to(device, torch.float32, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            answers[k] = network, one.shape
        elif device.type == "cpu":
            answers[k] = one.network, one.shape
    with autocast(precision, device):
        by_batch = {batch: measure([*answers.values()], batch, device, seconds) for batch in BATCHES}
    costs = [one.cost for one in found]
    for place, k in enumerate(answers):
        costs[k] = replace(costs[k], latencies={batch: times[place] for batch, times in by_batch.items()})
    return costs


def _named(config: NetworkConfig, name: str, classes: int, shape: Shape, test: float | None = None) -> Contender:
    """Return a network with new weights: what they are changes none of its costs."""
    network = fresh(config, classes=classes, shape=shape).eval()
    with torch.inference_mode():
        try:
            network(torch.zeros(2, *shape))
        except Exception as error:
            size = "x".join(map(str, shape))
            raise ConfigError(
                f"{name} must take images of {size}, but does not: {one_line(error)}. See --image-size."
            ) from error
    counts = count(network, shape)
    own = Cost(name, counts.parameters, counts.macs, counts.bytes, test)
    return Contender(network, shape, own)


def _of_package(storage: Storage, teacher: Mapping[str, Any] | None = None, *, threads: int) -> list[Contender]:
    """Return a student and what it was exported to, behind its teacher if it had one, or behind a given one.

    Args:
        storage: The student's package.
        teacher: Its network and its accuracy.
        threads: For exported ones.
    """
    student = load_student(storage, "float32")
    own, shape = student.config["dfkt"], student.input_size
    if own.get("teacher"):
        teacher = {**own["teacher"], "network": own["teacher"]["settings"]["network"]}
    found = []
    if teacher is not None:
        config, test = from_dict(NetworkConfig, teacher["network"]), teacher.get("test_accuracy")
        found.append(_named(config, f"teacher {config.name}", len(student.classes), shape, test))
    counts, size = count(student.network, shape), len(storage.read(WEIGHTS_FILE) or b"")
    cost = Cost(f"student {own['network']['name']}", counts.parameters, counts.macs, size, own["test_accuracy"])
    return [*found, Contender(student.network, shape, cost), *_exported(storage, own["weights"], threads)]


def _exported(storage: Storage, weights: str, threads: int) -> Iterator[Contender]:
    """Yield what the student of a package was exported to, as far as it lies beside it; what cannot be read is told."""
    with readable(storage):
        names = [name for name in EXPORTS.values() if storage.exists(name)]
    for name in names:
        try:
            found = open_exported(storage, name, threads)
            if found.about["weights"] != weights:
                raise CheckpointError(f"{storage.path}/{name} is another student's. Export this one anew.")
            yield exported(found, name)
        except InputError as error:
            tell(f"left out: {error}")


def exported(found: Exported, name: str) -> Contender:
    """Return an exported student as it is measured."""
    return Contender(found, found.input_size, Cost(name, size=found.size, test_accuracy=found.about["test_accuracy"]))


def of_study(storage: Storage, threads: int) -> list[Contender]:
    """Return a study's best student, behind its teacher.

    Raises:
        CheckpointError: If no final run is complete, or the student is gone.
    """
    package, study = best_package(storage)
    config, known = study.meta["config"], study.meta.get("teacher")
    teacher = None if known is None else {**known, "network": config["teacher"]["network"]}
    return _of_package(package, teacher, threads=threads)


def best_package(storage: Storage) -> tuple[Storage, Study]:
    """Return the folder of a study's best student, and the study.

    Raises:
        CheckpointError: If no final run is complete.
    """
    from dfkt.analysis.figures import study_figures
    from dfkt.analysis.statistics import best_student

    study = read_study(storage, "config")
    name = best_student(study_figures({study.name: study}), study.name)
    if name is None:
        raise CheckpointError(f"A study must have a complete final run, but {storage.path} has none yet.")
    return storage.sub("students", name), study
