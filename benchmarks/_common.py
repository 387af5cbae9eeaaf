"""What the speed benchmarks share: random images, networks and stages, timing in turns, and a table."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dfkt.config import NetworkConfig, OptimizerConfig, Precision, TrainConfig
from dfkt.data.image_set import ImageSet, Split
from dfkt.methods.base import Stage, Term
from dfkt.methods.dfkt import Dfkt, StageOrder
from dfkt.networks.build import build_network, network_taps
from dfkt.networks.resnet import ResNet
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps
from dfkt.training.loop import Training
from dfkt.training.targets import Keeping

BATCH, SIZE, CLASSES, PADDING = 128, 32, 10, 4
MEAN, STD = (0.5, 0.5, 0.5), (0.29, 0.29, 0.29)
RATE, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4
SHAPE = (3, SIZE, SIZE)

Repeats = Iterator[float]
"""Each ``next`` takes the steps of one repeat and gives their seconds."""


@dataclass(frozen=True)
class Row:
    """One line of a table of speeds; ``ratio`` is held against ``target``."""

    name: str
    seconds: float
    """Of one step, the median over the repeats."""
    ratio: str = ""
    target: str = ""


def random_images(count: int) -> ImageSet:
    """Return noise in the place of CIFAR-10, cropped and flipped like it."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=draws)
    split = Split(images, torch.randint(CLASSES, (count,), generator=draws))
    classes = tuple(map(str, range(CLASSES)))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ImageSet.make(split, split, classes, name="noise", mean=mean, std=std, padding=PADDING, flip=True)


def build(name: str) -> ResNet:
    """Return a network with random weights whose running statistics fit random images."""
    torch.manual_seed(0)
    network = build_network(NetworkConfig(name=name), num_classes=CLASSES, in_channels=3)
    assert isinstance(network, ResNet)
    with torch.no_grad():
        for _ in range(10):
            network(torch.rand(32, *SHAPE) / STD[0] - MEAN[0] / STD[0])
    return network


def tapped(name: str) -> TappedNetwork:
    """Return a student as a run builds it."""
    network = build(name).to(memory_format=torch.channels_last)
    return TappedNetwork(network, network_taps(network, NetworkConfig(name=name)), SHAPE)


def frozen(name: str) -> FrozenTeacher:
    """Return a teacher as a run builds it."""
    network = build(name)
    return FrozenTeacher(network, network.taps, SHAPE)


def flow_stage(student: TappedNetwork, pattern: str, order: StageOrder = "joint") -> Stage:
    """Return the first flow stage of a pattern, long enough for any number of repeats."""
    schedule = Dfkt(pattern=pattern, order=order, flow_rate=RATE).schedule(1.0, StudentTaps.of(student.taps))
    return replace(schedule[0], epochs=1e6)


def flow_training(
    data: ImageSet,
    pattern: str,
    order: StageOrder = "joint",
    *,
    student: str = "resnet8",
    teacher: str = "resnet26",
    term: Callable[[Stage], Term] | None = None,
    kind: type[Training] = Training,
    precision: Precision = "float32",
    keeping: Keeping | None = None,
) -> Training:
    """Return a run with one flow stage; ``term`` replaces its loss."""
    network = tapped(student)
    stage = flow_stage(network, pattern, order)
    if term is not None:
        stage = replace(stage, terms=(term(stage),))
    optimizer = OptimizerConfig(schedule="constant", momentum=MOMENTUM, weight_decay=DECAY)
    config = TrainConfig(batch_size=BATCH, precision=precision, optimizer=optimizer)
    return kind((stage,), network, frozen(teacher), data, config, keeping=keeping)


def in_turns(cases: Mapping[str, Repeats], steps: int, repeats: int) -> dict[str, list[float]]:
    """Return seconds per step of every repeat; the cases take turns, and the first turn is thrown away."""
    turns = [{name: next(case) / steps for name, case in cases.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in cases}


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header() -> str:
    """Return on what the figures were measured."""
    return f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32, batch {BATCH}"


def print_table(rows: list[Row]) -> None:
    """Print speeds, ratios and targets in columns."""
    print(f"{'case':<18}{'images/s':>10}{'ms/step':>10}  {'ratio':<32}{'target':<10}")
    for row in rows:
        speed = f"{BATCH / row.seconds:>10.0f}{1000 * row.seconds:>10.1f}"
        print(f"{row.name:<18}{speed}  {row.ratio:<32}{row.target:<10}".rstrip())
