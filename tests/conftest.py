"""Tiny networks, synthetic images and a clean home for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dfkt.config import DataConfig, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.image_set import ImageSet, Split
from dfkt.methods.dfkt import Dfkt
from dfkt.training.config import RunConfig

torch.set_num_threads(1)
RAY_MARKS = [
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),  # one cluster on a machine at a time
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Ray leaves sockets and files of its connections to the garbage collector, and warns of its own deprecations.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CPUS = 2
HOLD = f"""
import ray, sys
ray.init(num_cpus={CPUS}, num_gpus=0, include_dashboard=True, object_store_memory={200 * 2**20}, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def load_script(path: Path) -> ModuleType:
    """Import a script that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def images() -> ImageSet:
    """96 training images of 4 classes, 8x8, whose class shows in their brightness; 24 for val."""
    return synthetic_images()


def synthetic_images(
    size: int = 8, channels: int = 1, classes: int = 4, *, count: int = 96, padding: int = 1, flip: bool = False
) -> ImageSet:
    draws = torch.Generator().manual_seed(0)
    return ImageSet.make(
        _synthetic_split(count, size, channels, classes, draws),
        _synthetic_split(24, size, channels, classes, draws),
        tuple(str(k) for k in range(classes)),
        name="synthetic",
        mean=torch.full((channels,), 0.4),
        std=torch.full((channels,), 0.2),
        padding=padding,
        flip=flip,
    )


def synthetic_test_split(size: int = 8, channels: int = 1, classes: int = 4) -> Split:
    """24 test images of the kind that :func:`synthetic_images` makes."""
    return _synthetic_split(24, size, channels, classes, torch.Generator().manual_seed(1))


def _synthetic_split(count: int, size: int, channels: int, classes: int, draws: torch.Generator) -> Split:
    labels = torch.arange(count) % classes
    noise = torch.randint(0, 60, (count, size, size, channels), generator=draws)
    return Split((noise + 45 * labels[:, None, None, None]).to(torch.uint8), labels)


def write_image(
    path: Path,
    size: tuple[int, int] = (8, 8),
    mode: str = "RGB",
    seed: int = 0,
    pixels: NDArray[np.uint8] | None = None,
) -> None:
    """Write an image file, of noise of a width and height unless pixels are given."""
    if pixels is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def run_config() -> RunConfig:
    """A run of seconds: digits, ResNet-8 at a quarter width taught by a ResNet-8 at half width."""
    return RunConfig(
        method=Dfkt(pattern="dense-2", share=0.5),
        data=DataConfig(name="digits", limit_train=300, limit_test=60),
        teacher=TeacherConfig(
            network=NetworkConfig(name="resnet8", width=0.5), train=TrainConfig(epochs=1, batch_size=64)
        ),
        student=NetworkConfig(name="resnet8", width=0.25),
        train=TrainConfig(epochs=3, batch_size=64),
    )


@pytest.fixture
def placement(tmp_path: Path) -> Placement:
    """Teachers in the test's own folder."""
    return Placement(teacher_root=str(tmp_path / "teachers"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for a file's studies, and the environment of its cluster: every process must have the same."""
    from dfkt.study.cluster import ENVIRONMENT  # imports Ray, which most tests do without

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """The address of a cluster that lasts as long as a file's tests; a process of its own holds it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder, holder.stdin, holder.stdout:
        lines = (line.split() for line in holder.stdout)
        found = next((words[1] for words in lines if words[:1] == ["address"]), None)
        assert found, "Ray did not start"  # on a busy machine its parts time out
        yield found
        holder.stdin.close()
        holder.wait(60)


def processes_of(session: int) -> list[int]:
    """Return the processes that belong to a session, its leader left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z" and int(stat.parent.name) != session:
            found.append(int(stat.parent.name))
    return found
