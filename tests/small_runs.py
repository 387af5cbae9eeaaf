"""Runs of a few steps on synthetic images, networks with oddities that training must bear; worker processes import them."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from dfkt.config import NetworkConfig, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.methods.attention import Attention
from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.dkd import Dkd
from dfkt.methods.fsp import Fsp
from dfkt.methods.hints import FitNets, LayerwiseHint
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.methods.similarity import Similarity
from dfkt.networks.build import build_network, network_taps
from dfkt.networks.tapped import FrozenTeacher, TappedNetwork
from dfkt.networks.taps import StudentTaps
from dfkt.training.loop import Training
from dfkt.training.optim import network_dtype
from dfkt.training.parallel import Group
from dfkt.training.targets import Keeping

METHODS: dict[str, Method] = {
    "scratch": Scratch(),
    "kd": Kd(),
    "fitnets": FitNets(share=0.5),
    "attention": Attention(),
    "layerwise-hint": LayerwiseHint(share=0.5),
    "similarity": Similarity(),
    "dkd": Dkd(warmup=0.5),
    "fsp": Fsp(share=0.5),
    "dfkt": Dfkt(pattern="dense-2", share=0.5, weight=0.5),
}
"""Every method, with its last stage long enough to be seen in a run of an epoch."""
ROUNDS = Dfkt(pattern="dense-2", order="local", rounds=2, share=0.5, freeze_below=True, weight=0.5)
TRAIN = TrainConfig(epochs=4.5, batch_size=32)
_TEACHERS: dict[Any, FrozenTeacher] = {}
TIMES = ("seconds", "images_per_second", "kept_share")
RESNET = NetworkConfig(name="resnet8", width=0.25)
DROPPING = NetworkConfig(name="small_runs:dropping")


def dropping(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network that drops activations below and above its second tap."""
    layers = OrderedDict(
        low=nn.Conv2d(in_channels, 4, 3, padding=1), norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.2),
        high=nn.Conv2d(4, 6, 3, padding=1, stride=2), relu=nn.ReLU(), late=nn.Dropout(0.5),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(6, num_classes),
    )  # fmt: skip
    network = nn.Sequential(layers)
    network.taps = ("low", "high")
    return network


def bare_norms(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network whose batch norms have no parameters, keep no statistics, or average over all steps."""
    return _normed(num_classes, in_channels, {"affine": False}, {"track_running_stats": False}, {"momentum": None})


def usual_norms(num_classes: int, in_channels: int) -> nn.Module:
    """Return the same network with usual batch norms."""
    return _normed(num_classes, in_channels, {}, {}, {})


def _normed(num_classes: int, in_channels: int, *kinds: dict[str, Any]) -> nn.Module:
    layers = OrderedDict(
        low=nn.Conv2d(in_channels, 4, 3, padding=1), plain=nn.BatchNorm2d(4, **kinds[0]), relu=nn.ReLU(),
        mid=nn.Conv2d(4, 4, 3, padding=1), own=nn.BatchNorm2d(4, **kinds[1]), relu2=nn.ReLU(),
        high=nn.Conv2d(4, 6, 3, padding=1, stride=2), mean=nn.BatchNorm2d(6, **kinds[2]), relu3=nn.ReLU(),
        top=nn.Conv2d(6, 6, 3, padding=1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(6, num_classes),
    )  # fmt: skip
    network = nn.Sequential(layers)
    network.taps = ("relu", "relu2", "relu3", "top")
    return network


class Unread(nn.Module):
    """It has a head that its forward pass never reads, as networks for pretraining do."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Linear(4, num_classes)
        self.spare = nn.Linear(4, 7)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.fc(torch.relu(self.conv(images)).mean((2, 3)))


class Secretive(nn.Module):
    """Its taps cannot be told, and its forward pass cannot be traced."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = torch.relu(self.conv(images))
        return self.fc(x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3)))


def start(
    images: ImageSet,
    method: Method = ROUNDS,
    train: TrainConfig = TRAIN,
    *,
    student: NetworkConfig = RESNET,
    teacher: NetworkConfig | nn.Module = RESNET,
    group: Group | None = None,
    keeping: Keeping | None = None,
    replay: bool = False,
) -> Training:
    """Return a run that is ready to start; both networks' weights are always the same."""
    shape = (images.channels, *images.image_size)
    network = build(student, images, seed=1)
    tapped = TappedNetwork(network, network_taps(network, student) if method.tapped else (), shape)
    frozen = frozen_teacher(images, teacher, method.tapped, network_dtype(train.precision)) if method.taught else None
    schedule = method.schedule(train.epochs, StudentTaps.of(tapped.taps))
    return Training(schedule, tapped, frozen, images, train, group, keeping, replay=replay)


def frozen_teacher(
    images: ImageSet, teacher: NetworkConfig | nn.Module, tapped: bool, dtype: torch.dtype
) -> FrozenTeacher:
    """Return a teacher, kept for the next run of the process."""
    key = (images.checksum, teacher, tapped, dtype)
    if key not in _TEACHERS:
        network = teacher
        if isinstance(network, NetworkConfig):
            network = fitted(build(network, images, seed=2), images)
        network = copy.deepcopy(network).to(dtype)
        names = network_taps(network, RESNET) if tapped else ()
        _TEACHERS[key] = FrozenTeacher(network, names, (images.channels, *images.image_size))
    return _TEACHERS[key]


def build(config: NetworkConfig, images: ImageSet, seed: int) -> nn.Module:
    """Return a network with weights of a seed; what others draw is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config, num_classes=images.num_classes, in_channels=images.channels)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fitted(network: nn.Module, images: ImageSet) -> nn.Module:
    """Return a network whose running statistics fit the images, as a trained teacher's do."""
    with torch.no_grad(), torch.random.fork_rng():
        for _ in range(20):
            network.train()(images.normalise(images.train.images))
    return network


def weights(training: Training) -> dict[str, Tensor]:
    """Return a copy of the student's parameters and buffers."""
    return {name: value.clone() for name, value in training.student.network.state_dict().items()}


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what differs from run to run."""
    return {name: value for name, value in record.items() if name not in TIMES}


def records(training: Training) -> list[dict[str, Any]]:
    """Run to the end and return all records, timeless."""
    return [timeless(record) for record in training.run()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
