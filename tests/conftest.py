"""Tiny networks, synthetic images and a clean home for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from pathlib import Path

import pytest
import torch

from dfkt.config import DataConfig, FlowConfig, NetworkConfig, RunConfig, TeacherConfig, TrainConfig
from dfkt.data import ImageSet, Split

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def images() -> ImageSet:
    """96 training images of 4 classes, 8x8, whose class shows in their brightness; 24 for val and for test."""
    return synthetic_images()


def synthetic_images(size: int = 8, channels: int = 1, classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 60, (count, size, size, channels), generator=generator)
        return Split((noise + 45 * labels[:, None, None, None]).to(torch.uint8), labels)

    return ImageSet(
        name="synthetic",
        title="synthetic",
        classes=tuple(str(k) for k in range(classes)),
        train=split(96),
        val=split(24),
        test=split(24),
        mean=torch.full((channels,), 0.4),
        std=torch.full((channels,), 0.2),
        padding=1,
        flip=False,
        notes=(),
    )


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    """A run of seconds: digits, ResNet-8 at a quarter width taught by a ResNet-8 at half width."""
    return RunConfig(
        data=DataConfig(name="digits", limit_train=300, limit_test=60),
        teacher=TeacherConfig(
            network=NetworkConfig(name="resnet8", width=0.5),
            train=TrainConfig(epochs=1, batch_size=64),
            root=str(tmp_path / "teachers"),
        ),
        student=NetworkConfig(name="resnet8", width=0.25),
        flow=FlowConfig(pattern="dense-2", share=0.5),
        train=TrainConfig(epochs=3, batch_size=64),
    )
