"""Students that are exported, and networks that cannot be; the tests of several modules share them."""

from pathlib import Path
from typing import Any

import torch
from conftest import synthetic_images
from small_runs import fitted
from torch import Tensor, nn

from dfkt.config import DataConfig, NetworkConfig, Placement, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.students.keep import keep_student
from dfkt.training.config import RunConfig
from dfkt.training.run import Job, Trained, run_job

SMALL = NetworkConfig(name="resnet8", width=0.25)


def left(folder: Path, name: str = "", data: ImageSet | None = None, **data_config: Any) -> Path:
    """Keep a student in a folder: of a given network, or a small one; of given images, or of synthetic ones."""
    config = NetworkConfig(name=name) if name else SMALL
    data = data or synthetic_images()
    network = build_network(config, num_classes=data.num_classes, in_channels=data.channels)
    if not name:
        network = fitted(network, data)
    run = RunConfig(method=Scratch(), student=config, data=DataConfig(**data_config))
    keep_student(Storage(folder), Trained(run, network.eval(), data, 0.5, 0.25))
    return folder


def taught_digits(folder: Path) -> Path:
    """Leave a student of scikit-learn's digits, trained for a few epochs and tested."""
    run = RunConfig(
        method=Scratch(),
        data=DataConfig(name="digits"),
        student=NetworkConfig(name="resnet8", width=0.5),
        train=TrainConfig(epochs=4, precision="float32"),
    )
    run_job(Job(run, Placement(), str(folder), None, test=True, keep=keep_student), lambda _: None)
    return folder


class _Bessel(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(1, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.special.bessel_j0(x).mean((1, 2, 3))[:, None])
        return out


class _Deciding(_Bessel):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((1, 2, 3))[:, None])
        return out if x.sum() > 0 else -out


def bessel(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network with an operator that ONNX has not."""
    return _Bessel(num_classes)


def deciding(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network that looks at its images' values to know what to do."""
    return _Deciding(num_classes)
